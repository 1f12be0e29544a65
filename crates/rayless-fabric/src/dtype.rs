//! Element types, by torch's names.

use std::{fmt, str::FromStr};

macro_rules! dtypes {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $text:literal, $size:literal;)*) => {
        /// The type of a tensor's elements. The number is its code on the wire.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u8)]
        pub enum DType { $($(#[$doc])* $name = $code,)* }

        impl DType {
            /// Every element type.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Bytes of one element.
            pub const fn size(self) -> u64 {
                match self { $(Self::$name => $size,)* }
            }

            /// torch's name without the `torch.`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// The type of a code on the wire.
            pub const fn from_code(code: u8) -> Option<Self> {
                match code { $($code => Some(Self::$name),)* _ => None }
            }
        }
    };
}

dtypes! {
    /// One byte, 0 or 1.
    Bool = 0, "bool", 1;
    /// Unsigned, 8 bits.
    U8 = 1, "uint8", 1;
    /// Signed, 8 bits.
    I8 = 2, "int8", 1;
    /// Signed, 16 bits.
    I16 = 3, "int16", 2;
    /// Unsigned, 16 bits.
    U16 = 4, "uint16", 2;
    /// Signed, 32 bits.
    I32 = 5, "int32", 4;
    /// Unsigned, 32 bits.
    U32 = 6, "uint32", 4;
    /// Signed, 64 bits.
    I64 = 7, "int64", 8;
    /// Unsigned, 64 bits.
    U64 = 8, "uint64", 8;
    /// IEEE half precision.
    F16 = 9, "float16", 2;
    /// The upper half of a float32.
    BF16 = 10, "bfloat16", 2;
    /// IEEE single precision.
    F32 = 11, "float32", 4;
    /// IEEE double precision.
    F64 = 12, "float64", 8;
    /// A pair of float16.
    C32 = 13, "complex32", 4;
    /// A pair of float32.
    C64 = 14, "complex64", 8;
    /// A pair of float64.
    C128 = 15, "complex128", 16;
    /// 8 bits, 4 of exponent, no infinities.
    F8E4M3FN = 16, "float8_e4m3fn", 1;
    /// 8 bits, 4 of exponent, no negative zero.
    F8E4M3FNUZ = 17, "float8_e4m3fnuz", 1;
    /// 8 bits, 5 of exponent.
    F8E5M2 = 18, "float8_e5m2", 1;
    /// 8 bits, 5 of exponent, no negative zero.
    F8E5M2FNUZ = 19, "float8_e5m2fnuz", 1;
    /// 8 bits of exponent: a scale.
    F8E8M0FNU = 20, "float8_e8m0fnu", 1;
    /// Two 4-bit floats in a byte.
    F4E2M1FNX2 = 21, "float4_e2m1fn_x2", 1;
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text given names no element type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a dtype that a link can carry")]
pub struct UnknownDType(pub String);

impl FromStr for DType {
    type Err = UnknownDType;
    fn from_str(text: &str) -> Result<Self, UnknownDType> {
        let name = text.strip_prefix("torch.").unwrap_or(text);
        Self::ALL.iter().copied().find(|d| d.name() == name).ok_or_else(|| UnknownDType(text.to_owned()))
    }
}

/// A set of element types: what a receiver can take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DTypeSet(u64);

impl DTypeSet {
    /// All of them.
    pub const ALL: Self = Self((1 << DType::ALL.len()) - 1);

    /// Just these.
    pub fn of(types: &[DType]) -> Self {
        Self(types.iter().fold(0, |set, d| set | 1 << (*d as u8)))
    }

    /// Whether `dtype` is among them.
    pub const fn contains(self, dtype: DType) -> bool {
        self.0 & (1 << (dtype as u8)) != 0
    }

    pub(crate) const fn bits(self) -> u64 {
        self.0
    }

    pub(crate) const fn from_bits(bits: u64) -> Self {
        Self(bits & Self::ALL.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_reads_back_from_its_name_and_code() {
        for &dtype in DType::ALL {
            assert_eq!(dtype.name().parse(), Ok(dtype));
            assert_eq!(format!("torch.{dtype}").parse(), Ok(dtype));
            assert_eq!(DType::from_code(dtype as u8), Some(dtype));
            assert!(DTypeSet::ALL.contains(dtype));
        }
        assert_eq!(DType::from_code(DType::ALL.len() as u8), None);
        assert_eq!("qint8".parse::<DType>(), Err(UnknownDType("qint8".into())));
        assert!(!DTypeSet::of(&[DType::BF16]).contains(DType::F32));
    }
}
