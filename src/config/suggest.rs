//! Suggestions for mistyped words.

/// The word closest to `typed`, if one is close enough.
pub(super) fn nearest<'a>(typed: &str, words: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let length = typed.chars().count();
    // The table of distances grows with the product of the lengths, and no key is that long.
    if length > 40 {
        return None;
    }
    let near = (length / 3).clamp(1, 3);
    let typed = typed.to_lowercase();
    let begins_alike = |word: &str| {
        length >= 3 && (word.starts_with(&typed) || word.len() >= 3 && typed.starts_with(word))
    };
    words
        .map(|word| (distance(&typed, word), word))
        .filter(|&(edits, word)| {
            edits <= near && edits < word.chars().count() || begins_alike(word)
        })
        .min_by_key(|&(edits, _)| edits)
        .map(|(_, word)| word)
}

/// "`a`, `b` or `c`".
pub(super) fn listed<'a>(words: impl Iterator<Item = &'a str>) -> String {
    let mut quoted: Vec<String> = words.map(|word| format!("`{word}`")).collect();
    match quoted.pop() {
        Some(last) if !quoted.is_empty() => format!("{} or {last}", quoted.join(", ")),
        Some(only) => only,
        None => String::new(),
    }
}

/// The edit distance: insertions, deletions, substitutions and swaps of neighbours between the two words.
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows = vec![vec![0; b.len() + 1]; a.len() + 1];
    for i in 0..=a.len() {
        for j in 0..=b.len() {
            rows[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let differs = usize::from(a[i - 1] != b[j - 1]);
                let edited =
                    (rows[i - 1][j] + 1).min(rows[i][j - 1] + 1).min(rows[i - 1][j - 1] + differs);
                let swapped = i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1];
                if swapped { edited.min(rows[i - 2][j - 2] + 1) } else { edited }
            };
        }
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_finger_finds_the_word() {
        for (typed, meant) in [
            ("lisen", "listen"),
            ("tagret", "target"),
            ("Target", "target"),
            ("failover_", "failover"),
            ("failover_targets", "failover"),
            ("fail", "failover"),
        ] {
            assert_eq!(nearest(typed, ["listen", "target", "failover"].into_iter()), Some(meant));
        }
    }

    #[test]
    fn another_word_finds_none() {
        assert_eq!(nearest("upstream", ["listen", "target", "failover"].into_iter()), None);
        assert_eq!(nearest("x", ["on"].into_iter()), None);
        assert_eq!(nearest("", ["a"].into_iter()), None);
        assert_eq!(nearest(&"listen".repeat(1000), ["listen"].into_iter()), None);
    }

    #[test]
    fn distances_are_those_of_the_books() {
        for (a, b, edits) in [("", "abc", 3), ("kitten", "sitting", 3), ("ab", "ba", 1)] {
            assert_eq!(distance(a, b), edits, "{a} {b}");
            assert_eq!(distance(b, a), edits, "{b} {a}");
        }
    }
}
