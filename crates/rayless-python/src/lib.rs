//! rayless-python
