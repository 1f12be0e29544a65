//! What the kernel says of processes and threads in `/proc` (proc(5)).

use std::{fs, path::PathBuf, str::SplitAsciiWhitespace};

/// The name in a `stat` file, which may hold anything, and the fields behind it: the first of them is the third of the file, the state.
pub(crate) fn name_and_fields(stat: &str) -> Option<(&str, SplitAsciiWhitespace<'_>)> {
    let (name, fields) = stat.split_once('(')?.1.rsplit_once(')')?;
    Some((name, fields.split_ascii_whitespace()))
}

/// The threads of a process: id and folder. None where it is gone.
pub(crate) fn threads(pid: u32) -> impl Iterator<Item = (u32, PathBuf)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.filter_map(|task| Some((task.file_name().to_str()?.parse().ok()?, task.path())))
}

/// Whether the mask of that name (`SigPnd`, `SigCgt`, …) in a `status` file has the signal.
pub(crate) fn has_signal(status: &str, mask: &str, signal: i32) -> bool {
    let of_line = |line: &str| u64::from_str_radix(line.strip_prefix(mask)?.strip_prefix(':')?.trim(), 16).ok();
    status.lines().find_map(of_line).is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_full_of_brackets_is_read_over() {
        let (name, fields) = name_and_fields("7 (a) b) S 1) Z 12").unwrap();
        assert_eq!((name, fields.collect::<Vec<_>>()), ("a) b) S 1", vec!["Z", "12"]));
        assert!(name_and_fields("7 nonsense").is_none());
    }

    #[test]
    fn this_process_has_this_thread() {
        let me = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        assert!(threads(std::process::id()).any(|(id, folder)| id == me && folder.join("stat").exists()));
    }
}
