//! Functions of the assembly that rustc writes for x86-64 and aarch64, and their loops that multiply.

use petgraph::algo::tarjan_scc;
use petgraph::graphmap::DiGraphMap;

/// One function.
pub struct Function<'a> {
    /// Path of the function without the hash, `flash_attention::device::…`.
    pub path: String,
    lines: Vec<Line<'a>>,
    /// True if a register other than the stack pointer holds the address of the frame.
    has_frame_pointer: bool,
}

/// A line that matters.
#[derive(Clone, Copy)]
enum Line<'a> {
    Label(&'a str),
    Instruction(&'a str),
}

/// Instructions that follow each other, and where they lead.
struct Block<'a> {
    instructions: Vec<&'a str>,
    next: Vec<usize>,
}

/// A loop that multiplies, without another such loop within.
#[derive(Debug)]
pub struct Loop<'a> {
    pub instructions: Vec<&'a str>,
    has_frame_pointer: bool,
}

impl Loop<'_> {
    /// Multiply-adds of vectors: what the loop is there for.
    pub fn products(&self) -> usize {
        self.instructions.iter().filter(|text| is_product(text)).count()
    }

    /// Instructions that read or write the stack.
    pub fn of_stack(&self) -> impl Iterator<Item = &str> {
        let stack = if self.has_frame_pointer {
            &["(%rsp", "(%rbp", "[sp", "[x29"][..]
        } else {
            &["(%rsp", "[sp"]
        };
        let accesses = move |text: &&str| stack.iter().any(|base| text.contains(base));
        self.instructions.iter().copied().filter(accesses)
    }
}

/// Returns true if an instruction multiplies vectors and adds, or multiplies tiles.
fn is_product(text: &str) -> bool {
    let name = text.split_whitespace().next().unwrap_or_default();
    let of_x86 = name.starts_with("vfmadd") && name.ends_with("ps") || name == "mulps" || name == "vdpbf16ps";
    of_x86 || name == "tdpbf16ps" || matches!(name, "fmla" | "bfmmla")
}

/// The functions of a file whose path has `part`.
pub fn functions<'a>(assembly: &'a str, part: &str) -> Vec<Function<'a>> {
    let mut functions: Vec<Function<'a>> = Vec::new();
    let mut wanted = false;
    for line in assembly.lines() {
        let label = line.strip_suffix(':').filter(|label| !label.starts_with(['\t', ' ']));
        if let Some(name) = label.filter(|label| !label.starts_with(".L")) {
            let path = demangled(name);
            wanted = path.contains(part);
            if wanted {
                functions.push(Function {
                    path,
                    lines: Vec::new(),
                    has_frame_pointer: false,
                });
            }
            continue;
        }
        let Some(function) = functions.last_mut().filter(|_| wanted) else {
            continue;
        };
        // Comments of x86-64, and of aarch64, where `#16` is a number.
        let text = line.split(" # ").next().unwrap_or_default();
        let text = text.split("//").next().unwrap_or_default().trim();
        let text = if text.starts_with('#') { "" } else { text };
        match label {
            Some(label) => function.lines.push(Line::Label(label)),
            None if text.is_empty() || text.starts_with('.') => (),
            None => {
                function.has_frame_pointer |= is_frame(text);
                function.lines.push(Line::Instruction(text));
            }
        }
    }
    functions
}

/// Returns true if an instruction makes a register the address of the frame.
fn is_frame(text: &str) -> bool {
    let words: Vec<&str> = text.split([' ', '\t', ',']).filter(|word| !word.is_empty()).collect();
    matches!(words[..], ["movq", "%rsp", "%rbp"] | ["mov" | "add", "x29", "sp", ..])
}

/// The path that a symbol stands for, without its hash; symbols of another kind as they are.
fn demangled(symbol: &str) -> String {
    format!("{:#}", rustc_demangle::demangle(symbol))
}

impl<'a> Function<'a> {
    /// All instructions, in order.
    pub fn instructions(&self) -> impl Iterator<Item = &'a str> {
        self.lines.iter().filter_map(|line| match line {
            Line::Instruction(text) => Some(*text),
            Line::Label(_) => None,
        })
    }

    /// Loops of the function that multiply and have no such loop within, in order.
    pub fn loops(&self) -> Vec<Loop<'a>> {
        let blocks = self.blocks();
        let mut graph = DiGraphMap::<usize, ()>::new();
        for (from, block) in blocks.iter().enumerate() {
            graph.add_node(from);
            block.next.iter().for_each(|&to| _ = graph.add_edge(from, to, ()));
        }
        let multiplies = |block: usize| blocks[block].instructions.iter().any(|text| is_product(text));
        let mut innermost = Vec::new();
        find_innermost(&graph, &multiplies, &mut innermost);
        innermost.sort();
        let of_blocks = |numbers: Vec<usize>| Loop {
            instructions: numbers
                .into_iter()
                .flat_map(|number| blocks[number].instructions.iter().copied())
                .collect(),
            has_frame_pointer: self.has_frame_pointer,
        };
        innermost.into_iter().map(of_blocks).collect()
    }

    fn blocks(&self) -> Vec<Block<'a>> {
        // Blocks begin at labels and after branches.
        let mut labels = std::collections::HashMap::new();
        let mut blocks: Vec<Block<'a>> = vec![Block {
            instructions: Vec::new(),
            next: Vec::new(),
        }];
        let mut ended = false;
        for line in &self.lines {
            if ended || matches!(line, Line::Label(_)) {
                blocks.push(Block {
                    instructions: Vec::new(),
                    next: Vec::new(),
                });
            }
            ended = false;
            match *line {
                Line::Label(label) => _ = labels.insert(label, blocks.len() - 1),
                Line::Instruction(text) => {
                    blocks.last_mut().expect("there is one").instructions.push(text);
                    ended = Branch::of(text).is_some();
                }
            }
        }
        let count = blocks.len();
        for (number, block) in blocks.iter_mut().enumerate() {
            let branch = block.instructions.last().and_then(|text| Branch::of(text));
            let target = branch.as_ref().and_then(|branch| labels.get(branch.target));
            block.next.extend(target);
            if branch.is_none_or(|branch| branch.goes_on) && number + 1 < count {
                block.next.push(number + 1);
            }
        }
        blocks
    }
}

/// An instruction that leads elsewhere.
struct Branch<'a> {
    /// A label, where it is one.
    target: &'a str,
    /// True if the next instruction may follow.
    goes_on: bool,
}

impl<'a> Branch<'a> {
    fn of(text: &'a str) -> Option<Self> {
        let mut words = text.split([' ', '\t', ',']).filter(|word| !word.is_empty());
        let name = words.next()?;
        let goes_on = match name {
            "jmp" | "jmpq" | "b" | "br" | "ret" | "retq" | "ud2" | "brk" | "udf" => false,
            "cbz" | "cbnz" | "tbz" | "tbnz" => true,
            _ if name.starts_with('j') || name.starts_with("b.") => true,
            _ => return None,
        };
        Some(Self {
            target: words.next_back().unwrap_or_default(),
            goes_on,
        })
    }
}

/// The blocks of every loop of a graph that multiplies and has no such loop within. What else is within, such as a loop that asks
/// memory for lines, is a part of it.
fn find_innermost(graph: &DiGraphMap<usize, ()>, multiplies: &impl Fn(usize) -> bool, innermost: &mut Vec<Vec<usize>>) {
    for component in tarjan_scc(graph) {
        let inside = |block: &usize| component.contains(block);
        if component.len() == 1 && !graph.contains_edge(component[0], component[0]) {
            continue;
        }
        // Without the block it is entered at, what is left of the loop are the loops within.
        let is_entered = |&&block: &&usize| {
            let mut before = graph.neighbors_directed(block, petgraph::Incoming);
            before.any(|block| !inside(&block))
        };
        let entry = component.iter().filter(is_entered).min().or(component.iter().min());
        let mut within = DiGraphMap::new();
        for (from, to, ()) in graph.all_edges() {
            if inside(&from) && inside(&to) && Some(&from) != entry && Some(&to) != entry {
                within.add_edge(from, to, ());
            }
        }
        let found = innermost.len();
        find_innermost(&within, multiplies, innermost);
        if innermost.len() == found && component.iter().any(|&block| multiplies(block)) {
            let mut blocks = component.clone();
            blocks.sort_unstable();
            innermost.push(blocks);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A loop of x86-64 within another; the inner one has a sum on the stack.
    const X86: &str = "
_ZN15flash_attention6device3cpu7kernels3isa4avx27product17h0123456789abcdefE:
\tpushq\t%rbp
\txorl\t%ecx, %ecx
.LBB0_1:
\tvmovups\t(%rsi), %ymm0
\tmovq\t%rcx, 8(%rsp)
.LBB0_2:
\tvmovups\t32(%rsp), %ymm1 # 32-byte Reload
\tvfmadd231ps\t(%rdi), %ymm0, %ymm1
\tvmovups\t%ymm1, 32(%rsp)
\t.loc\t1 2 3
\tdecq\t%rax
\tjne\t.LBB0_2
\tincq\t%rcx
\tjne\t.LBB0_1
\tretq
_ZN15flash_attention5other17h0123456789abcdefE:
\tjmp\t.LBB1_1
";

    /// A loop of aarch64 whose body has a branch, and one that keeps to its registers.
    const ARM: &str = "
_ZN15flash_attention6device3cpu7kernels3isa4neon7product17h0123456789abcdefE:
\tmov\tx29, sp
.LBB0_1:
\tcbz\tx1, .LBB0_3
\tldr\ts1, [x29, #16]
.LBB0_3:
\t//APP
\tfmla\tv0.4s, v1.4s, v2.s[0]
\t//NO_APP
\tb.ne\t.LBB0_1
.LBB0_4:
\tfmla\tv0.4s, v1.4s, v2.s[0]
\tsubs\tx0, x0, #1
\tb.ne\t.LBB0_4
\tret
";

    #[test]
    fn a_sum_on_the_stack_of_an_innermost_loop_is_found() {
        let functions = functions(X86, "cpu::kernels::isa");
        assert_eq!(functions.len(), 1);
        assert_eq!(
            functions[0].path,
            "flash_attention::device::cpu::kernels::isa::avx2::product"
        );
        let loops = functions[0].loops();
        assert_eq!(loops.len(), 1, "the outer loop is not one: {loops:?}");
        assert_eq!(loops[0].instructions.len(), 5);
        assert_eq!((loops[0].products(), loops[0].of_stack().count()), (1, 2));
    }

    #[test]
    fn a_loop_that_does_not_multiply_is_a_part_of_the_one_around_it() {
        let asks = X86.replace("vfmadd231ps\t(%rdi), %ymm0, %ymm1", "prefetcht1\t(%rdi)");
        let around = asks.replace("\tincq\t%rcx", "\tvfmadd231ps\t(%rdi), %ymm0, %ymm1");
        assert_eq!(functions(&asks, "cpu::kernels::isa")[0].loops().len(), 0);
        let loops = functions(&around, "cpu::kernels::isa")[0].loops();
        assert_eq!(loops.len(), 1, "{loops:?}");
        assert_eq!((loops[0].products(), loops[0].of_stack().count()), (1, 3));
    }

    #[test]
    fn loops_with_branches_are_whole_and_frames_are_stack() {
        let functions = functions(ARM, "cpu::kernels::isa");
        let loops = functions[0].loops();
        let counts: Vec<_> = loops
            .iter()
            .map(|l| (l.instructions.len(), l.products(), l.of_stack().count()))
            .collect();
        assert_eq!(counts, [(4, 1, 1), (3, 1, 0)]);
    }
}
