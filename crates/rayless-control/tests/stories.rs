//! Runs every story in `tests/stories`: each is a tale about a cluster, with what must come true.
//! `RAYLESS_STORY=name cargo test -p rayless-control --test stories` runs those whose name contains it.

mod support;

use support::story;

#[test]
fn stories() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/stories");
    let only = std::env::var("RAYLESS_STORY").unwrap_or_default();
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "story") && f.to_string_lossy().contains(&only));
    files.sort();
    assert!(files.len() >= 25 || !only.is_empty(), "only {} stories", files.len());
    let mut failed = Vec::new();
    for file in &files {
        let text = std::fs::read_to_string(file).unwrap();
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        if let Err(told) = story::run(&text) {
            println!("=== {name}.story, {told}");
            failed.push(name);
        }
    }
    assert!(failed.is_empty(), "{} of {} stories failed: {failed:?}", failed.len(), files.len());
}

#[test]
fn a_story_that_is_not_true_names_its_line() {
    let told = story::run("node a: 1 GPU\nwait 1s\n# next\nexpect node a dead").err().unwrap();
    assert!(told.starts_with("line 4: expect node a dead\n    but it is alive"), "{told}");
    assert!(story::run("nod a: 1 GPU").err().unwrap().contains("no such command"));
}
