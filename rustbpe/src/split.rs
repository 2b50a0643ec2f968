//! Text -> pieces that merges never cross, cut as GPT-4's pattern cuts it.
//!
//! The default family of patterns (at most 1, 2 or 3 digits in a piece) is a state machine over characters, many times
//! faster than a regex engine; every other pattern goes through fancy-regex. Both give the same pieces.

use std::sync::OnceLock;

use regex_syntax::hir::{Class, HirKind};

/// The default: the pattern of GPT-4, with at most two digits to a piece, so that a small vocabulary is not spent on numbers.
pub const DEFAULT_DIGITS: usize = 2;

/// The pattern of the default family that keeps at most `digits` digits together.
pub fn family_pattern(digits: usize) -> String {
    format!(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|\p{{N}}{{1,{digits}}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )
}

/// A compiled split pattern.
pub enum Splitter {
    Family { digits: usize, classes: &'static Classes },
    Regex(Box<fancy_regex::Regex>),
}

impl Splitter {
    /// Pattern -> splitter; the message says what is wrong with a pattern that does not compile.
    pub fn new(pattern: &str) -> Result<Splitter, String> {
        if let Some(digits) = (1..=3).find(|&digits| family_pattern(digits) == pattern) {
            return Ok(Splitter::Family { digits, classes: classes() });
        }
        Splitter::regex(pattern)
    }

    /// The same through fancy-regex whatever the pattern: the tests compare the two.
    pub fn regex(pattern: &str) -> Result<Splitter, String> {
        match fancy_regex::Regex::new(pattern) {
            Ok(regex) => Ok(Splitter::Regex(Box::new(regex))),
            Err(error) => Err(format!("the split pattern {pattern:?} is not a regular expression ({error}): mend it, or leave it out")),
        }
    }

    pub fn is_family(&self) -> bool {
        matches!(self, Splitter::Family { .. })
    }

    /// Calls `each(start, end)` with the byte range of every piece, in order. Text that no alternative matches is left out.
    #[inline(always)]
    pub fn for_each(&self, text: &str, mut each: impl FnMut(usize, usize)) -> Result<(), String> {
        match self {
            Splitter::Family { digits, classes } => {
                let bytes = text.as_bytes();
                let mut start = 0;
                while start < bytes.len() {
                    let end = classes.piece_end(bytes, start, *digits);
                    each(start, end);
                    start = end;
                }
            }
            Splitter::Regex(regex) => {
                for found in regex.find_iter(text) {
                    let found = found.map_err(|error| {
                        format!("the split pattern gave up on a text of {} bytes ({error}): use a simpler pattern", text.len())
                    })?;
                    if found.start() < found.end() {
                        each(found.start(), found.end());
                    }
                }
            }
        }
        Ok(())
    }
}

const OTHER: u8 = 0; // neither letter, number nor white space: punctuation, symbols, marks, controls
const LETTER: u8 = 1; // \p{L}
const NUMBER: u8 = 2; // \p{N}
const SPACE: u8 = 3; // \s but for the next two
const NEWLINE: u8 = 4; // \r and \n

const BLOCK: usize = 256;

/// The class of every code point: a table for ASCII, and blocks of 256 shared where they are equal for the rest.
pub struct Classes {
    ascii: [u8; 128],
    block_of: Vec<u16>,
    blocks: Vec<[u8; BLOCK]>,
}

fn classes() -> &'static Classes {
    static CLASSES: OnceLock<Classes> = OnceLock::new();
    CLASSES.get_or_init(Classes::new)
}

impl Classes {
    fn new() -> Classes {
        let mut flat = vec![OTHER; 0x110000];
        for (property, class) in [(r"\p{L}", LETTER), (r"\p{N}", NUMBER), (r"\s", SPACE), (r"[\r\n]", NEWLINE)] {
            let hir = regex_syntax::parse(property).expect("a fixed pattern");
            if let HirKind::Class(Class::Unicode(set)) = hir.kind() {
                for range in set.ranges() {
                    flat[range.start() as usize..=range.end() as usize].fill(class);
                }
            } else {
                unreachable!("{property} is a class of characters");
            }
        }
        let mut classes = Classes { ascii: [OTHER; 128], block_of: Vec::new(), blocks: Vec::new() };
        classes.ascii.copy_from_slice(&flat[..128]);
        for chunk in flat.chunks_exact(BLOCK) {
            let block: [u8; BLOCK] = chunk.try_into().expect("chunks are exact");
            let known = classes.blocks.iter().position(|other| *other == block);
            classes.block_of.push(known.unwrap_or(classes.blocks.len()) as u16);
            if known.is_none() {
                classes.blocks.push(block);
            }
        }
        classes
    }

    /// (class, width in bytes) of the character that starts at `at`.
    #[inline(always)]
    fn at(&self, text: &[u8], at: usize) -> (u8, usize) {
        let first = text[at];
        if first < 128 {
            (self.ascii[first as usize], 1)
        } else {
            self.beyond_ascii(text, at)
        }
    }

    #[inline]
    fn beyond_ascii(&self, text: &[u8], at: usize) -> (u8, usize) {
        let tail = |offset: usize| (text[at + offset] & 0x3F) as usize;
        let first = text[at] as usize;
        let (code, width) = match first {
            0..=0xDF => ((first & 0x1F) << 6 | tail(1), 2),
            0xE0..=0xEF => ((first & 0x0F) << 12 | tail(1) << 6 | tail(2), 3),
            _ => ((first & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4),
        };
        (self.blocks[self.block_of[code / BLOCK] as usize][code % BLOCK], width)
    }

    /// The end of the run of `class` that starts at `at` (`at` itself if the run is empty).
    #[inline(always)]
    fn run(&self, text: &[u8], mut at: usize, class: u8) -> usize {
        while at < text.len() {
            let (found, width) = self.at(text, at);
            if found != class {
                break;
            }
            at += width;
        }
        at
    }

    /// The end of the piece that starts at `start`. The comments quote the alternatives of the pattern in its order.
    #[inline(always)]
    fn piece_end(&self, text: &[u8], start: usize, digits: usize) -> usize {
        let (class, width) = self.at(text, start);
        let next = start + width;
        match class {
            LETTER => self.run(text, next, LETTER),
            NUMBER => {
                // \p{N}{1,digits}
                let mut end = next;
                for _ in 1..digits {
                    match end < text.len() {
                        true if self.at(text, end).0 == NUMBER => end += self.at(text, end).1,
                        _ => break,
                    }
                }
                end
            }
            OTHER => {
                // '(?i:[sdmt]|ll|ve|re)
                if text[start] == b'\'' {
                    let end = contraction_end(text, next);
                    if end > next {
                        return end;
                    }
                }
                // [^\r\n\p{L}\p{N}]?+\p{L}+
                let end = self.run(text, next, LETTER);
                if end > next {
                    return end;
                }
                self.others_end(text, next)
            }
            _ => {
                if class == SPACE {
                    // [^\r\n\p{L}\p{N}]?+\p{L}+
                    let end = self.run(text, next, LETTER);
                    if end > next {
                        return end;
                    }
                    if text[start] == b' ' && next < text.len() && self.at(text, next).0 == OTHER {
                        return self.others_end(text, next);
                    }
                }
                self.white_end(text, start)
            }
        }
    }

    /// ` ?[^\s\p{L}\p{N}]++[\r\n]*`, from behind its optional space or first character on.
    fn others_end(&self, text: &[u8], at: usize) -> usize {
        let end = self.run(text, at, OTHER);
        self.run(text, end, NEWLINE)
    }

    /// `\s*[\r\n]|\s+(?!\S)|\s+`: up to the last line break; else all at the end of the text; else all but the last.
    fn white_end(&self, text: &[u8], start: usize) -> usize {
        let (mut end, mut last, mut line_break) = (start, start, start);
        while end < text.len() {
            let (class, width) = self.at(text, end);
            if class < SPACE {
                break;
            }
            last = end;
            end += width;
            if class == NEWLINE {
                line_break = end;
            }
        }
        if line_break > start {
            line_break
        } else if end == text.len() || last == start {
            end
        } else {
            last
        }
    }
}

/// The end of an English contraction's letters behind an apostrophe, or `at` where there are none.
fn contraction_end(text: &[u8], at: usize) -> usize {
    let lower = |offset: usize| text.get(at + offset).map_or(0, u8::to_ascii_lowercase);
    match (lower(0), lower(1)) {
        (b's' | b'd' | b'm' | b't', _) => at + 1,
        (b'l', b'l') | (b'v' | b'r', b'e') => at + 2,
        (0xC5, 0xBF) => at + 2, // U+017F, the long s, is an s to (?i)
        _ => at,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(splitter: &Splitter, text: &str) -> Vec<String> {
        let mut found = Vec::new();
        splitter.for_each(text, |start, end| found.push(text[start..end].to_string())).unwrap();
        found
    }

    #[test]
    fn the_state_machine_cuts_as_fancy_regex_does() {
        let alphabet: Vec<char> =
            "aZsSlLvVeErRdmtſK'’ \u{a0}\u{85}\u{3000}\u{2028}\t\r\n\u{b}0٣½²Ⅷ.,!-_é漢字े́\u{200d}😀\u{0}\u{1c}".chars().collect();
        let mut state = 12345u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % below
        };
        for digits in 1..=3 {
            let fast = Splitter::new(&family_pattern(digits)).unwrap();
            let slow = Splitter::regex(&family_pattern(digits)).unwrap();
            assert!(fast.is_family() && !slow.is_family());
            for _ in 0..30_000 {
                let text: String = (0..random(12)).map(|_| alphabet[random(alphabet.len())]).collect();
                assert_eq!(pieces(&fast, &text), pieces(&slow, &text), "{text:?}");
            }
        }
    }

    #[test]
    fn every_character_has_the_class_that_fancy_regex_gives_it() {
        let fast = Splitter::new(&family_pattern(2)).unwrap();
        let slow = Splitter::regex(&family_pattern(2)).unwrap();
        for code in 0..0x110000u32 {
            if let Some(c) = char::from_u32(code) {
                let text = format!("x{c}y  {c}12");
                assert_eq!(pieces(&fast, &text), pieces(&slow, &text), "U+{code:04X}");
            }
        }
    }
}
