//! Payloads as lists of slices, walked by byte offset.

use std::io::IoSliceMut;

/// Bytes to send: the tensors of a message one after the other, never gathered into one buffer.
#[derive(Clone, Copy, Debug)]
pub struct Scatter<'a> {
    parts: &'a [&'a [u8]],
    tail: &'a [u8],
    len: u64,
}

impl<'a> Scatter<'a> {
    /// A payload of these parts.
    pub fn new(parts: &'a [&'a [u8]]) -> Self {
        Self::with_tail(parts, &[])
    }

    /// A payload of these parts and then `tail`.
    pub fn with_tail(parts: &'a [&'a [u8]], tail: &'a [u8]) -> Self {
        Self { parts, tail, len: parts.iter().map(|p| p.len() as u64).sum::<u64>() + tail.len() as u64 }
    }

    /// Nothing.
    pub const EMPTY: Self = Self { parts: &[], tail: &[], len: 0 };

    /// Bytes of all parts.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Its parts and its tail.
    pub(crate) const fn parts(&self) -> (&'a [&'a [u8]], &'a [u8]) {
        (self.parts, self.tail)
    }

    /// Whether there is not one byte.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Hands `visit` the slices that make up `offset..offset + len`, until it returns false.
    pub fn walk(&self, mut offset: u64, mut len: u64, mut visit: impl FnMut(&'a [u8]) -> bool) {
        for part in self.parts.iter().chain(std::iter::once(&self.tail)) {
            let part_len = part.len() as u64;
            if offset >= part_len {
                offset -= part_len;
                continue;
            }
            let take = (part_len - offset).min(len);
            // Both fit in usize: they are within a slice.
            if take == 0 || !visit(&part[offset as usize..(offset + take) as usize]) {
                return;
            }
            len -= take;
            offset = 0;
        }
    }
}

/// Room for a payload: the receiver's tensors one after the other.
#[derive(Debug)]
pub struct ScatterMut<'a, 'b> {
    parts: &'a mut [&'b mut [u8]],
    tail: &'a mut [u8],
    len: u64,
}

impl<'a, 'b> ScatterMut<'a, 'b> {
    /// Room made of these parts.
    pub fn new(parts: &'a mut [&'b mut [u8]]) -> Self {
        Self::with_tail(parts, &mut [])
    }

    /// Room made of these parts and then `tail`.
    pub fn with_tail(parts: &'a mut [&'b mut [u8]], tail: &'a mut [u8]) -> Self {
        let len = parts.iter().map(|p| p.len() as u64).sum::<u64>() + tail.len() as u64;
        Self { parts, tail, len }
    }

    /// Bytes of all parts.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is not one byte.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Hands `visit` the slices that make up `offset..offset + len`, until it returns false.
    pub fn walk(&mut self, offset: u64, len: u64, visit: impl FnMut(&mut [u8]) -> bool) {
        self.slices(offset, len).all(visit);
    }

    /// Lists the slices that make up `offset..offset + len` in `out`, as many as it has room for; gives how many.
    pub(crate) fn list<'s>(&'s mut self, offset: u64, len: u64, out: &mut [IoSliceMut<'s>]) -> usize {
        let listed = out.iter_mut().zip(self.slices(offset, len));
        listed.map(|(place, slice)| *place = IoSliceMut::new(slice)).count()
    }

    /// The slices that make up `offset..offset + len`, none of them empty.
    fn slices(&mut self, mut offset: u64, mut len: u64) -> impl Iterator<Item = &mut [u8]> {
        let tail = std::iter::once(&mut *self.tail);
        self.parts.iter_mut().map(|part| &mut **part).chain(tail).filter_map(move |part| {
            let part_len = part.len() as u64;
            if offset >= part_len {
                offset -= part_len;
                return None;
            }
            let take = (part_len - offset).min(len);
            let slice = &mut part[offset as usize..(offset + take) as usize];
            len -= take;
            offset = 0;
            (take > 0).then_some(slice)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_walk_visits_exactly_the_bytes_asked_for() {
        let parts: [&[u8]; 3] = [b"abc", b"", b"defg"];
        let scatter = Scatter::with_tail(&parts, b"h");
        assert_eq!(scatter.len(), 8);
        for offset in 0..=8 {
            for len in 0..=8 - offset {
                let mut seen = Vec::new();
                scatter.walk(offset, len, |slice| {
                    seen.extend_from_slice(slice);
                    true
                });
                assert_eq!(seen, &b"abcdefgh"[offset as usize..(offset + len) as usize], "{offset}+{len}");
            }
        }
    }

    #[test]
    fn a_list_has_the_slices_of_a_walk() {
        let (mut a, mut b, mut tail) = (*b"abc", *b"defg", *b"h");
        let mut parts: [&mut [u8]; 3] = [&mut a, &mut [], &mut b];
        let mut scatter = ScatterMut::with_tail(&mut parts, &mut tail);
        for offset in 0..=8 {
            for len in 0..=8 - offset {
                let mut walked = Vec::new();
                scatter.walk(offset, len, |slice| {
                    walked.push(slice.to_vec());
                    true
                });
                let mut listed = [const { None }; 4].map(|_: Option<()>| IoSliceMut::new(&mut []));
                let used = scatter.list(offset, len, &mut listed);
                assert!(listed[..used].iter().map(|slice| slice.to_vec()).eq(walked), "{offset}+{len}");
            }
        }
        let mut one = [IoSliceMut::new(&mut [])];
        assert_eq!((scatter.list(1, 7, &mut one), one[0].len()), (1, 2));
    }
}
