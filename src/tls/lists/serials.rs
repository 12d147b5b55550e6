//! A compact set of serial numbers: a list may have a million of them.

use std::{cmp::Ordering, ops::Range};

/// Serial numbers in DER, sorted.
pub(super) struct Serials {
    /// The serial numbers, one after another.
    bytes: Vec<u8>,
    /// The end of each of them.
    ends: Vec<u32>,
}

impl Serials {
    pub(super) fn new(mut serials: Vec<&[u8]>) -> Self {
        serials.sort_unstable();
        serials.dedup();
        let mut bytes = Vec::with_capacity(serials.iter().map(|serial| serial.len()).sum());
        let add = |serial: &[u8]| {
            bytes.extend_from_slice(serial);
            // It fits: lists that large are not read.
            bytes.len() as u32
        };
        let ends = serials.into_iter().map(add).collect();
        Self { bytes, ends }
    }

    pub(super) fn contains(&self, serial: &[u8]) -> bool {
        let mut among = 0..self.ends.len();
        while !among.is_empty() {
            let middle = among.start + among.len() / 2;
            match serial.cmp(&self.bytes[self.place(middle)]) {
                Ordering::Equal => return true,
                Ordering::Less => among.end = middle,
                Ordering::Greater => among.start = middle + 1,
            }
        }
        false
    }

    fn place(&self, nth: usize) -> Range<usize> {
        let start = nth.checked_sub(1).map_or(0, |before| self.ends[before]);
        start as usize..self.ends[nth] as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_serial_number_is_found_and_no_other() {
        let all: [&[u8]; 7] =
            [b"", b"\x00\x80", b"\x01", b"\x01\x02", b"\x01\x02\x03", b"\x7f", b"\xff"];
        let of = |bits: usize| {
            (0..all.len()).rev().filter(move |nth| bits >> nth & 1 == 1).map(|nth| all[nth])
        };
        for bits in 0..1 << all.len() {
            // Serial numbers may occur twice in a list.
            let serials = Serials::new(of(bits).chain(of(bits)).collect());
            for (nth, serial) in all.iter().enumerate() {
                assert_eq!(serials.contains(serial), bits >> nth & 1 == 1, "{bits:b}: {serial:?}");
            }
        }
    }
}
