//! A program in the text of a kernel: every [marker](flash_attention_kernels::program) replaced by the program's instructions.

use std::fmt::{self, Write as _};

use flash_attention_kernels::program::Marker;

use super::NodeId;
use super::print::Printer;
use super::scope::Scope;
use super::text::{Code, Slot};

/// Name of the kernel parameter that holds the program's numbers.
const PARAMETER: &str = "score_program";

/// A kernel with a program in it.
#[derive(Clone, Debug)]
pub struct Spliced {
    /// The module.
    pub text: String,
    /// Numbers in the kernel's second parameter, 8 bytes each, in order.
    pub slots: Vec<Slot>,
    /// Lines of the program in the text, counted from 1, each with the node that it computes. Those of dropout, sinks and sums of
    /// gradients have no node.
    pub lines: Vec<(usize, Option<NodeId>)>,
}

/// Why a kernel's text takes no program: it is not one that was compiled for programs, or is of another version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotSpliced(pub String);

impl fmt::Display for NotSpliced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the score program cannot be written into the kernel: {}", self.0)
    }
}

/// Writes a program into a kernel that was compiled for programs. With `exact`, its arithmetic is f32 to the last few
/// bits; else functions may be as coarse as 16-bit scores.
///
/// # Errors
/// [`NotSpliced`] if the text is not that of such a kernel.
pub fn splice(ptx: &str, code: &Code, exact: bool) -> Result<Spliced, NotSpliced> {
    let lines: Vec<Line<'_>> = ptx.lines().map(Line::read).collect::<Result<_, _>>()?;
    let tile = lines.iter().find_map(|line| match line {
        Line::Marker(Marker::Tile { tile, .. }) => Some(*tile),
        _ => None,
    });
    let mut printer = Printer::new(code, exact, tile);
    let printed = print_all(&mut printer, &lines);
    let mut out = Writer::default();
    let mut body = false;
    for (line, scope) in lines.iter().zip(printed) {
        match (line, scope) {
            (_, Some(scope)) => out.scope(scope),
            (Line::Marker(_), None) => {}
            // The parameter list ends with a parenthesis of its own, the entry's body starts with a brace.
            (Line::Code(")"), None) if !body => {
                if !printer.slots().is_empty() {
                    out.append_parameter(printer.slots().len() * 8);
                }
                out.line(")");
            }
            (Line::Code("{"), None) if !body => {
                body = true;
                out.line("{");
                for declaration in printer.declarations() {
                    out.line(&declaration);
                }
            }
            (Line::Code(code), None) => out.line(code),
        }
    }
    Ok(Spliced {
        text: out.text,
        slots: printer.into_slots(),
        lines: out.nodes,
    })
}

/// A line of a kernel.
enum Line<'a> {
    Code(&'a str),
    Marker(Marker<'a>),
}

impl<'a> Line<'a> {
    fn read(line: &'a str) -> Result<Self, NotSpliced> {
        match Marker::read(line) {
            None => Ok(Self::Code(line)),
            Some(Ok(marker)) => Ok(Self::Marker(marker)),
            Some(Err(())) => Err(NotSpliced(format!("a marker that is not known: {line}"))),
        }
    }
}

/// Prints each marker. Markers of scores come first: the values that they keep are computed at tiles, and the values that tiles
/// keep at heads.
fn print_all(printer: &mut Printer<'_>, lines: &[Line<'_>]) -> Vec<Option<Scope>> {
    let mut printed: Vec<Option<Scope>> = lines.iter().map(|_| None).collect();
    let stages: [fn(&Marker<'_>) -> bool; 3] = [
        |marker| !matches!(marker, Marker::Tile { .. } | Marker::Head { .. }),
        |marker| matches!(marker, Marker::Tile { .. }),
        |marker| matches!(marker, Marker::Head { .. }),
    ];
    for stage in stages {
        for (line, printed) in lines.iter().zip(&mut printed) {
            if let Line::Marker(marker) = line
                && stage(marker)
            {
                *printed = printer.print(marker);
            }
        }
    }
    printed
}

/// The text as it grows, and which lines are of which node.
#[derive(Default)]
struct Writer {
    text: String,
    count: usize,
    nodes: Vec<(usize, Option<NodeId>)>,
}

impl Writer {
    fn line(&mut self, line: &str) {
        self.text.push_str(line);
        self.text.push('\n');
        self.count += 1;
    }

    fn scope(&mut self, scope: Scope) {
        self.line("\t{");
        for declaration in scope.declarations() {
            self.line(&declaration);
        }
        for (line, node) in scope.lines {
            self.line(&line);
            self.nodes.push((self.count, node));
        }
        self.line("\t}");
    }

    /// Adds the program's parameter after the kernel's own.
    fn append_parameter(&mut self, bytes: usize) {
        self.text.truncate(self.text.trim_end().len());
        let _ = write!(self.text, ",\n\t.param .align 8 .b8 {PARAMETER}[{bytes}]\n");
        self.count += 1;
    }
}

/// Reads the number at `slot` into a register.
pub(super) fn load_slot(kind: &str, register: &str, slot: usize) -> String {
    format!("ld.param.{kind} {register}, [{PARAMETER}+{}];", slot * 8)
}
