//! Sizes as people write them.

/// From one byte to a prefill of a long prompt; 14 and 28 KiB are one token's hop of models with 7,168 hidden elements.
pub(crate) const DEFAULT_SIZES: &str = "1,64,1KiB,4KiB,14KiB,28KiB,64KiB,256KiB,1MiB,4MiB,16MiB,64MiB,256MiB";

const LARGEST: u64 = 1 << 30;
const UNITS: [(&str, u32); 6] = [("GiB", 30), ("MiB", 20), ("KiB", 10), ("G", 30), ("M", 20), ("K", 10)];

/// One size: a number of bytes, KiB, MiB or GiB.
pub(crate) fn sizes(text: &str) -> Result<u64, String> {
    let (number, shift) = UNITS
        .iter()
        .find_map(|(unit, shift)| text.strip_suffix(unit).map(|number| (number, *shift)))
        .unwrap_or_else(|| (text.strip_suffix('B').unwrap_or(text), 0));
    let number: u64 =
        number.parse().map_err(|_| "not a size: a number of bytes, or with KiB, MiB or GiB behind it".to_owned())?;
    number
        .checked_mul(1 << shift)
        .filter(|bytes| (1..=LARGEST).contains(bytes))
        .ok_or_else(|| "not from 1 byte to 1 GiB".to_owned())
}

/// The shortest exact form.
pub(super) fn shown(bytes: u64) -> String {
    let unit = UNITS[..3].iter().find(|(_, shift)| bytes >= 1 << shift && bytes.is_multiple_of(1 << shift));
    unit.map_or_else(|| format!("{bytes} B"), |(unit, shift)| format!("{} {unit}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_they_are_written() {
        for (text, bytes) in [("1", 1), ("64B", 64), ("14KiB", 14 << 10), ("16M", 16 << 20), ("1GiB", 1 << 30)] {
            assert_eq!(sizes(text), Ok(bytes), "{text}");
        }
        for text in ["", "0", "KiB", "2GiB", "-1", "1.5MiB", "99999999999999999999", "18446744073709551615K"] {
            assert!(sizes(text).is_err(), "{text}");
        }
        for (bytes, text) in
            [(1, "1 B"), (1023, "1023 B"), (14 << 10, "14 KiB"), (1 << 28, "256 MiB"), (1025, "1025 B")]
        {
            assert_eq!(shown(bytes), text);
        }
        assert!(DEFAULT_SIZES.split(',').all(|text| sizes(text).is_ok()));
    }
}
