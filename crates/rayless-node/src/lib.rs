//! rayless-node
