//! `docs/options.md` says what `knobs.rs` declares.
#![allow(clippy::unwrap_used, reason = "a test ends with the first thing that is not as it should be")]

use rayless_node::knobs::{self, Knob};
use std::{env, fmt::Write as _, fs, path::Path};

fn page() -> String {
    let mut page = String::from(
        "# Options\n\nMade from `crates/rayless-node/src/knobs.rs`. A flag wins over its variable, which wins over the default. \
         A switch is set by its name alone, or by 1, true, yes or on in its variable.\n\n\
         | flag | variable | value | default | |\n|---|---|---|---|---|\n",
    );
    for Knob { flag, env, value, default, unit, doc } in knobs::ALL {
        let code = |text: &str| if text.is_empty() { String::new() } else { format!("`{}`", text.replace('|', "\\|")) };
        let flag = if flag.is_empty() { String::new() } else { format!("`--{flag}`") };
        let default = if unit.is_empty() || default.is_empty() {
            code(default)
        } else {
            format!("{} {unit}", code(default)).trim().to_owned()
        };
        let value = if value.is_empty() { "switch".to_owned() } else { code(value) };
        writeln!(page, "| {flag} | {} | {value} | {default} | {} |", code(env), doc.replace('|', "\\|")).unwrap();
    }
    page
}

#[test]
fn the_page_of_options_is_what_is_declared() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/options.md");
    if env::var_os("WRITE_DOCUMENTS").is_some() {
        fs::write(&path, page()).unwrap();
    }
    assert!(
        fs::read_to_string(&path).unwrap_or_default() == page(),
        "docs/options.md is out of date: run this test with WRITE_DOCUMENTS=1"
    );
}
