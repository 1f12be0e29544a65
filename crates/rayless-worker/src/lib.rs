//! rayless-worker
