//! Runs attention on a real input, on a device of your choice.
//!
//! `cargo run --release --example quickstart` reads the queries, keys and values that layer 5 of a pretrained
//! sentence encoder (all-MiniLM-L6-v2) computed for the Gettysburg Address, 12 heads of 331 tokens. It prints the
//! error against the answer in f64. `--help` lists the options.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use flash_attention::half::{bf16, f16};
use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Device, Element, Gradients, Output, Plan, Tensor};
use flash_attention_examples::command_line::{first_paragraph, refuse};
use flash_attention_examples::ragged::PackedAnswers;
use flash_attention_examples::timing::{Bar, measured, timed};
use flash_attention_examples::{
    Accuracy, AttentionFile, Failure, Features, Stored, Written, paged, ragged, write_output,
};

/// Runs attention, and with --backward its gradients, over q, k and v of a file. Compares with the answers stored in
/// the file, if there are any.
#[derive(Debug, Parser)]
#[command(name = "quickstart")]
struct Options {
    /// File with the tensors q, k, v and optionally out, lse, dout, dq, dk, dv [default: a layer of all-MiniLM-L6-v2]; v, out,
    /// dout and dv may have another head_dim than q and k
    #[arg(value_name = "FILE.safetensors")]
    file: Option<PathBuf>,
    /// cpu, cuda, cuda:N, emulator, emulator:sm_80, emulator:sm_90a, or best: a GPU if there is one, else the CPU
    #[arg(long, default_value = "best")]
    device: String,
    /// Element type to compute with
    #[arg(long, value_enum, default_value_t = ElementType::F32)]
    dtype: ElementType,
    #[command(flatten)]
    features: Features,
    /// Take q, k and v as sequences packed end to end, [total, heads, head_dim]; the file has `cu_seqlens_q` and `cu_seqlens_k`,
    /// i32 [batch + 1], and perhaps `seqused_k`, i32 [batch]
    #[arg(long)]
    ragged: bool,
    /// Take k and v as pages of a cache, [pages, `page_size`, heads, `head_dim`]; the file has `block_table`, i32
    /// [batch, `max_pages`], and `seqused_k`, i32 [batch]. q is [batch, heads, `seqlen_q`, `head_dim`] or, with `cu_seqlens_q`,
    /// i32 [batch + 1], packed as with --ragged
    #[arg(long, conflicts_with = "ragged")]
    paged: bool,
    /// Print a picture of the mask
    #[arg(long, conflicts_with_all = ["ragged", "paged"])]
    show_mask: bool,
    /// Compute the gradients of q, k and v too; the file must have dout, the gradient of out
    #[arg(long, conflicts_with = "paged")]
    backward: bool,
    /// Write out and lse to this file, all gradients if there are any, and dropout's mask `keep` if there is one
    #[arg(long, value_name = "FILE.safetensors")]
    output: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ElementType {
    F32,
    F16,
    Bf16,
}

fn main() -> ExitCode {
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) if !error.use_stderr() => error.exit(), // --help
        Err(error) => return refuse(&first_paragraph(&error.to_string())),
    };
    let result = match options.dtype {
        ElementType::F32 => run::<f32>(&options),
        ElementType::F16 => run::<f16>(&options),
        ElementType::Bf16 => run::<bf16>(&options),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => refuse(&format!("error: {failure}")),
    }
}

/// Runs the program; returns true if all errors are within their bounds.
fn run<T: Element>(options: &Options) -> Result<bool, Failure> {
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/minilm_layer5.safetensors");
    let path = options.file.as_ref().unwrap_or(&bundled);
    let file = AttentionFile::read(path)?;
    let dout = dout(options, path, &file)?;
    let device: Device = options.device.parse()?;
    if let Some(path) = &options.output {
        check_writable(path)?; // better now than after the work
    }

    let [q, k, v] = [
        file.q.upload::<T>(&device)?,
        file.k.upload::<T>(&device)?,
        file.v.upload::<T>(&device)?,
    ];
    let dout = dout.map(|dout| dout.upload::<T>(&device)).transpose()?;
    let attention = options.features.add_to(scaled(&file), &file, &device)?;
    if options.ragged {
        return run_ragged(options, path, &file, &attention, [&q, &k, &v], dout.as_ref());
    }
    if options.paged {
        return run_paged(options, path, &file, &attention, [&q, &k, &v]);
    }
    let plan = attention.plan(&q, &k, &v)?;

    let mut print = std::io::stdout().lock();
    print_input(path, &device, &mut print)?;
    if options.show_mask {
        let tile = [q.shape()[2], k.shape()[2]].map(picture_tile);
        writeln!(print, "mask      {}", attention.blocks_of(&q, &k, tile)?)?;
    }
    let output = measured(&device, &plan, &mut print, |bar| {
        let attention = attention.clone().on_progress(|progress| bar.show(progress));
        attention.forward(&q, &k, &v)
    })?;
    let gradients = match &dout {
        Some(dout) => {
            let plan = attention.plan_backward(&q, &k, &v, &output, dout)?;
            Some(measured(&device, &plan, &mut print, |bar| {
                let attention = attention.clone().on_progress(|progress| bar.show(progress));
                attention.backward(&q, &k, &v, &output, dout)
            })?)
        }
        None => None,
    };
    let written = Written {
        output: &output,
        gradients: gradients.as_ref(),
        keep: options.features.keep(&file),
        softmax_scale: plan.problem().softmax_scale(),
    };
    write_results(options, &written, &mut print)?;

    let shape = |tensor: &Tensor<T>| <[usize; 4]>::try_from(tensor.shape()).expect("the forward pass took it");
    let dims =
        Dims::with_program(&attention, shape(&q), shape(&k), attention.evaluator()?).with_head_dim_v(shape(&v)[3]);
    let out_passes = compare(options, &file, &dims, &output, &mut print)?;
    let gradients_pass = match &gradients {
        Some(gradients) => compare_gradients(options, &file, &dims, gradients, &mut print)?,
        None => true,
    };
    Ok(out_passes && gradients_pass)
}

/// Prints what is read and where it is solved.
fn print_input(path: &Path, device: &Device, print: &mut impl Write) -> Result<(), Failure> {
    writeln!(print, "input     {}", path.display())?;
    writeln!(print, "device    {device} ({})", device.name())?;
    Ok(())
}

/// Runs attention over packed sequences; returns true if all errors are within their bounds.
fn run_ragged<T: Element>(
    options: &Options,
    path: &Path,
    file: &AttentionFile,
    attention: &Attention,
    [q, k, v]: [&Tensor<T>; 3],
    dout: Option<&Tensor<T>>,
) -> Result<bool, Failure> {
    let sequences = ragged::sequences(file)?;
    let plans = attention.plan_ragged(q, k, v, &sequences)?;

    let print = &mut std::io::stdout().lock();
    print_input(path, q.device(), print)?;
    writeln!(print, "ragged    {sequences}")?;
    print_bytes(&plans, print)?;
    let (output, times) = timed(q.device(), |_| attention.forward_ragged(q, k, v, &sequences))?;
    writeln!(print, "forward   {times}")?;
    let mut gradients = None;
    if let Some(dout) = dout {
        let backward = |_: &Bar| attention.backward_ragged(q, k, v, &output, dout, &sequences);
        let (result, times) = timed(q.device(), backward)?;
        writeln!(print, "backward  {times}")?;
        gradients = Some(result);
    }
    let written = Written {
        output: &output,
        gradients: gradients.as_ref(),
        keep: None,
        softmax_scale: attention.scale_for(q.shape()[2]),
    };
    write_results(options, &written, print)?;
    let answers = || ragged::answers::<T>(attention, file, &sequences);
    compare_sequences(options, file, answers, (&output, gradients.as_ref()), print)
}

/// Runs attention over a paged cache; returns true if all errors are within their bounds.
fn run_paged<T: Element>(
    options: &Options,
    path: &Path,
    file: &AttentionFile,
    attention: &Attention,
    [q, k, v]: [&Tensor<T>; 3],
) -> Result<bool, Failure> {
    let cache = paged::cache(file)?;
    let plans = attention.plan_cached(q, k, v, &cache)?;

    let print = &mut std::io::stdout().lock();
    print_input(path, q.device(), print)?;
    writeln!(print, "paged     {cache}")?;
    print_bytes(&plans, print)?;
    let (output, times) = timed(q.device(), |_| attention.forward_cached(q, k, v, &cache))?;
    writeln!(print, "forward   {times}")?;
    let written = Written {
        output: &output,
        gradients: None,
        keep: None,
        softmax_scale: attention.scale_for(*q.shape().last().expect("forward took q")),
    };
    write_results(options, &written, print)?;
    let answers = || paged::answers::<T>(attention, file, &cache);
    compare_sequences(options, file, answers, (&output, None), print)
}

/// Prints the bytes that forward moves by its plans, one a sequence.
fn print_bytes(plans: &[Plan], print: &mut impl Write) -> Result<(), Failure> {
    let of = |plan: &Plan| plan.cost().bytes_read + plan.cost().bytes_written;
    let bytes: u128 = plans.iter().map(of).sum();
    writeln!(print, "HBM       {bytes} bytes read and written by forward")?;
    Ok(())
}

/// Writes results to the file that `--output` names, if there is one.
fn write_results<T: Element>(
    options: &Options,
    written: &Written<'_, T>,
    print: &mut impl Write,
) -> Result<(), Failure> {
    if let Some(path) = &options.output {
        write_output(path, written)?;
        writeln!(print, "written   {}", path.display())?;
    }
    Ok(())
}

/// Compares results over sequences with the stored answers and prints the error of each.
fn compare_sequences<T: Element>(
    options: &Options,
    file: &AttentionFile,
    answers: impl FnOnce() -> PackedAnswers<T>,
    (output, gradients): (&Output<T>, Option<&Gradients<T>>),
    print: &mut impl Write,
) -> Result<bool, Failure> {
    let (Some(out), Some(lse), true) = (&file.out, &file.lse, options.features.is_empty()) else {
        return not_compared(options, "answer", "out and lse", print);
    };
    let answers = answers();
    let accuracy = |index: usize, got: &Tensor<T>, stored: &Stored| {
        let (standard, exact) = (&answers.standard[index], &answers.exact[index]);
        Ok::<_, Failure>(Accuracy::of(&got.to_vec()?, &stored.elements, standard, exact))
    };
    let mut results = vec![("out", accuracy(0, &output.out, out)?)];
    let lse = Accuracy::of(
        &output.lse.to_vec()?,
        &lse.elements,
        &answers.standard_lse,
        &answers.exact_lse,
    );
    results.push(("lse", lse));
    if let Some(Gradients { dq, dk, dv, .. }) = gradients {
        for (index, (name, got)) in [("dq", dq), ("dk", dk), ("dv", dv)].into_iter().enumerate() {
            if let Some(stored) = &file.gradients[index] {
                results.push((name, accuracy(index + 1, got, stored)?));
            }
        }
    }
    for (name, accuracy) in &results {
        writeln!(print, "{name:<9} {accuracy}")?;
    }
    Ok(results.iter().all(|(_, accuracy)| accuracy.passes()))
}

/// Returns the gradient of out that backward starts from, if backward is asked for.
fn dout<'a>(options: &Options, path: &Path, file: &'a AttentionFile) -> Result<Option<&'a Stored>, Failure> {
    match &file.dout {
        _ if !options.backward => Ok(None),
        Some(dout) => Ok(Some(dout)),
        None => Err(Failure(format!(
            "{}: no tensor `dout`, the gradient of out, which --backward needs",
            path.display()
        ))),
    }
}

/// Returns full attention with the scale of a file.
fn scaled(file: &AttentionFile) -> Attention {
    match file.softmax_scale {
        Some(scale) => Attention::new().softmax_scale(scale),
        None => Attention::new(),
    }
}

/// Returns the length of a picture's tiles, a power of two: a sequence has at most 64 of them.
fn picture_tile(seqlen: usize) -> usize {
    seqlen.div_ceil(64).next_power_of_two()
}

/// Checks that a file can be written, and leaves it unchanged.
fn check_writable(path: &Path) -> Result<(), Failure> {
    let opened = std::fs::OpenOptions::new().append(true).create(true).open(path);
    opened
        .map(drop)
        .map_err(|error| Failure(format!("{}: {error}", path.display())))
}

/// Compares the output with the stored answer and prints both errors.
fn compare<T: Element>(
    options: &Options,
    file: &AttentionFile,
    dims: &Dims,
    output: &Output<T>,
    print: &mut impl Write,
) -> Result<bool, Failure> {
    let (Some(right_out), Some(right_lse), false) = (&file.out, &file.lse, !options.features.is_empty()) else {
        return not_compared(options, "answer", "out and lse", print);
    };
    let inputs = [&file.q, &file.k, &file.v];
    let [q, k, v] = inputs.map(Stored::round::<T>);
    let (standard_out, standard_lse) = reference::standard(dims, &q, &k, &v);
    let [q, k, v] = inputs.map(Stored::widen);
    let (exact_out, exact_lse) = reference::forward(dims, &q, &k, &v);
    let out = Accuracy::of(&output.out.to_vec()?, &right_out.elements, &standard_out, &exact_out);
    let lse = Accuracy::of(&output.lse.to_vec()?, &right_lse.elements, &standard_lse, &exact_lse);
    writeln!(print, "out       {out}")?;
    writeln!(print, "lse       {lse}")?;
    Ok(out.passes() && lse.passes())
}

/// Compares the gradients with the stored ones and prints the error of each.
fn compare_gradients<T: Element>(
    options: &Options,
    file: &AttentionFile,
    dims: &Dims,
    gradients: &Gradients<T>,
    print: &mut impl Write,
) -> Result<bool, Failure> {
    let ([Some(dq), Some(dk), Some(dv)], Some(dout), false) =
        (&file.gradients, &file.dout, !options.features.is_empty())
    else {
        return not_compared(options, "gradients", "dq, dk and dv", print);
    };
    let inputs = [&file.q, &file.k, &file.v, dout];
    let [q, k, v, dout] = inputs.map(Stored::round::<T>);
    let standard = reference::standard_backward(dims, &q, &k, &v, &dout);
    let [q, k, v, dout] = inputs.map(Stored::widen);
    let exact = reference::backward(dims, &q, &k, &v, &dout);
    let got = [&gradients.dq, &gradients.dk, &gradients.dv];
    let mut pass = true;
    for (i, (name, right)) in [("dq", dq), ("dk", dk), ("dv", dv)].into_iter().enumerate() {
        let accuracy = Accuracy::of(&got[i].to_vec()?, &right.elements, &standard[i], &exact[i]);
        writeln!(print, "{name}        {accuracy}")?;
        pass &= accuracy.passes();
    }
    Ok(pass)
}

/// Prints why there is nothing to compare with, which is no failure.
fn not_compared(options: &Options, what: &str, missing: &str, print: &mut impl Write) -> Result<bool, Failure> {
    let reason = if !options.features.is_empty() {
        "the stored one is for full attention".to_owned()
    } else {
        format!("the file stores no {missing}")
    };
    writeln!(print, "{what:<9} not compared: {reason}")?;
    Ok(true)
}
