//! The ring: shared memory between one writer, the workers of a host and the collector of their replies.
