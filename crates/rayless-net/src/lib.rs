//! rayless-net
