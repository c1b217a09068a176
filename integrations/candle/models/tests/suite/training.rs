//! Training: both attentions learn the same, and an interrupted run goes on as if nothing had happened.

use std::path::{Path, PathBuf};

use candle_core::{Device, Result};
use flash_attention_candle_models::attention::By;
use flash_attention_candle_models::tasks::{Genres, Language, ListOps, Paths, Task};
use flash_attention_candle_models::text::Text;
use flash_attention_candle_models::training::{Contestant, Settings, train};

const CONTEXT: usize = 48;

fn settings(steps: usize) -> Settings {
    Settings {
        steps,
        batch: 2,
        layers: 2,
        heads: 2,
        head_dim: 16,
        learning_rate: 3e-3,
        seed: 1,
        device: Device::Cpu,
    }
}

fn address() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../examples/data/gettysburg.txt")
}

fn text() -> Result<Text> {
    Text::read(&address(), CONTEXT)
}

fn next_bytes() -> Result<Language> {
    Ok(Language::next(text()?, CONTEXT, &Device::Cpu))
}

/// Both models after their last step, and the losses of all steps.
fn learn(task: &dyn Task, settings: &Settings) -> Result<[Contestant; 2]> {
    let mut contestants = [
        Contestant::new(By::Ours, task, settings)?,
        Contestant::new(By::Plain, task, settings)?,
    ];
    train(&mut contestants, task, settings, || false, |_, _| Ok(()))?;
    Ok(contestants)
}

/// Trains both and requires losses that agree. Returns ours.
fn agree(task: &dyn Task, settings: &Settings) -> Result<Contestant> {
    let [ours, plain] = learn(task, settings)?;
    assert_eq!(ours.losses.len(), settings.steps);
    for (step, (ours, plain)) in ours.losses.iter().zip(&plain.losses).enumerate() {
        assert!((ours - plain).abs() < 1e-3, "step {step}: {ours} and {plain}");
    }
    Ok(ours)
}

#[test]
fn a_gpt_learns_the_same_with_both_attentions() -> Result<()> {
    let ours = agree(&next_bytes()?, &settings(30))?;
    let (first, last) = (ours.losses[0], ours.losses[29]);
    assert!(last < 0.7 * first, "{first} becomes {last}");
    Ok(())
}

#[test]
fn hidden_bytes_are_learned_the_same() -> Result<()> {
    let task = Language::masked(text()?, CONTEXT, &Device::Cpu);
    let mut ours = agree(&task, &settings(20))?;
    let held_out = task.held_out(2)?;
    let score = ours.score(&held_out[0].batches)?;
    assert!(
        score.loss.is_finite() && (0.0..=1.0).contains(&score.accuracy),
        "{score:?}"
    );
    Ok(())
}

#[test]
fn expressions_are_learned_the_same() -> Result<()> {
    agree(&ListOps::new(100, &Device::Cpu)?, &settings(10))?;
    Ok(())
}

/// Texts of one class repeat another letter than those of the other, so a model that learns anything tells them apart.
#[test]
fn texts_of_two_classes_are_told_apart() -> Result<()> {
    let texts = [b'a', b'b'].map(|letter| vec![vec![letter; 200]; 4]);
    let task = Genres::new(texts, 40, &Device::Cpu)?;
    let mut ours = agree(&task, &settings(20))?;
    let held_out = task.held_out(6)?;
    assert_eq!(ours.score(&held_out[0].batches)?.accuracy, 1.0);
    Ok(())
}

/// A neighbourhood of pixels is a program of the library's, and a tensor of 0 and -inf beside it.
#[test]
fn paths_are_learned_the_same_as_pictures_grow() -> Result<()> {
    let task = Paths::new(vec![(0, 8), (2, 16)], &Device::Cpu)?;
    agree(&task, &settings(3))?;
    assert_eq!(task.held_out(1)?.len(), 2);
    Ok(())
}

#[test]
fn an_interrupted_run_goes_on_to_the_bit() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("flash-attention-resume-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let (task, settings) = (next_bytes()?, settings(24));
    for by in [By::Ours, By::Plain] {
        let mut whole = [Contestant::new(by, &task, &settings)?];
        train(&mut whole, &task, &settings, || false, |_, _| Ok(()))?;

        let mut half = [Contestant::new(by, &task, &settings)?];
        let steps = std::cell::Cell::new(0);
        let interrupted = || steps.replace(steps.get() + 1) == 12;
        train(&mut half, &task, &settings, interrupted, |_, _| Ok(()))?;
        half[0].save(&folder)?;
        assert_eq!(half[0].losses, whole[0].losses[..12]);

        let mut rest = [Contestant::new(by, &task, &settings)?];
        rest[0].resume(&folder)?;
        train(&mut rest, &task, &settings, || false, |_, _| Ok(()))?;
        assert_eq!(rest[0].losses, whole[0].losses);
    }
    let other = Settings {
        head_dim: 8,
        ..settings
    };
    let mut other = Contestant::new(By::Ours, &task, &other)?;
    assert!(other.resume(&folder).is_err(), "the checkpoint is of another width");
    Ok(std::fs::remove_dir_all(folder)?)
}

/// The program as a user runs it: Ctrl-C ends it well, with a checkpoint from which `--resume` goes on.
#[cfg(unix)]
#[test]
fn ctrl_c_leaves_a_checkpoint() -> Result<()> {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    let test = std::env::current_exe()?;
    let profile = test.parent().and_then(Path::parent).expect("target/<profile>/deps");
    let folder = std::env::temp_dir().join(format!("flash-attention-ctrl-c-{}", std::process::id()));
    let command = |steps: &str| {
        let mut command = Command::new(profile.join("examples/train_gpt"));
        command.arg("--text").arg(address()).arg("--output").arg(&folder);
        command.args([
            "--attention",
            "ours",
            "--layers",
            "1",
            "--heads",
            "1",
            "--head-dim",
            "16",
            "--context",
            "32",
        ]);
        command.args(["--steps", steps]).stdout(Stdio::piped());
        command
    };
    let mut program = command("1000000").spawn()?;
    let mut lines = BufReader::new(program.stdout.take().expect("a pipe")).lines();
    assert!(
        lines
            .next()
            .expect("a line after the first step")?
            .starts_with("gpt step    0")
    );
    assert!(
        Command::new("kill")
            .args(["-INT", &program.id().to_string()])
            .status()?
            .success()
    );
    assert!(program.wait()?.success());

    let resumed = command("1").arg("--resume").output()?;
    let printed = String::from_utf8_lossy(&resumed.stdout).into_owned();
    assert!(resumed.status.success(), "{printed}");
    let steps = printed
        .strip_prefix("ours: goes on after ")
        .and_then(|rest| rest.split_once(' '));
    assert!(
        steps.is_some_and(|(steps, _)| steps.parse::<usize>().is_ok_and(|steps| steps > 0)),
        "{printed}"
    );
    Ok(std::fs::remove_dir_all(folder)?)
}
