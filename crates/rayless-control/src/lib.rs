//! rayless-control
