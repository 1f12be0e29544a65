//! Takes secrets out of texts that leave the host: cluster tokens by their form, keys by theirs, and the values of what is named like a secret.
//!
//! The report never opens a file that holds a secret of rayless. This is for what programs printed into their logs, and for variables.

/// Instead of a secret.
const REMOVED: &str = "[removed]";
/// What a name has in it whose value is nobody's business.
const NAMES: [&str; 9] =
    ["token", "secret", "password", "passwd", "api_key", "apikey", "api-key", "authorization", "credential"];
/// Prefixes of tokens that are well known, and how many characters follow at least.
const PREFIXES: [(&str, usize); 6] =
    [("rl1_", 8), ("hf_", 20), ("sk-", 16), ("ghp_", 20), ("Bearer ", 8), ("AKIA", 16)];

/// Whether a variable or field of that name holds a secret.
pub(crate) fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    NAMES.iter().any(|part| name.contains(part)) || name.ends_with("_key") || name == "key"
}

/// `text` without secrets. Line by line, so that one odd line costs no other.
pub(crate) fn scrub(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut in_key = false;
    for line in text.split_inclusive('\n') {
        let begins = line.contains("-----BEGIN ") && line.contains("KEY-----");
        if begins || in_key {
            in_key = !(line.contains("-----END ") && line.contains("KEY-----"));
            if begins {
                out.push_str(REMOVED);
                out.push('\n');
            }
            continue;
        }
        out.push_str(&named(&known_forms(line)));
    }
    out
}

/// Takes out words that are tokens by their form.
pub(crate) fn known_forms(line: &str) -> String {
    let mut line = line.to_owned();
    for (prefix, least) in PREFIXES {
        let mut from = 0;
        while let Some(at) = line[from..].find(prefix).map(|at| from + at) {
            let begin = at + prefix.len();
            let length = line[begin..].find(|c: char| !is_token(c)).unwrap_or(line.len() - begin);
            // Within a longer word (`mask-…`) it is none.
            let alone = line[..at].chars().next_back().is_none_or(|c| !c.is_ascii_alphanumeric());
            from = begin;
            if length >= least && alone {
                line.replace_range(begin..begin + length, REMOVED);
                from += REMOVED.len();
            }
        }
    }
    line
}

/// Takes out the value after `name=`, `"name": ` or `--name ` where the name is that of a secret. Numbers stay: `max_tokens=16` is none.
fn named(line: &str) -> String {
    let lower = line.to_ascii_lowercase();
    if !NAMES.iter().any(|part| lower.contains(part)) && !lower.contains("_key") {
        return line.to_owned();
    }
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(at) = rest.find(['=', ':', ' ']) {
        let of_name = |c: char| c.is_ascii_alphanumeric() || "_-.\"'".contains(c);
        let name_at = at - rest[..at].chars().rev().take_while(|c| of_name(*c)).count();
        let name = rest[name_at..at].trim_matches(['"', '\'', '-']);
        let is_option = rest.as_bytes()[at] != b' ' || rest[name_at..at].starts_with("--");
        let (head, tail) = rest.split_at(at + 1);
        out.push_str(head);
        rest = tail;
        if !is_option || !is_secret(name) {
            continue;
        }
        let value_at = rest.find(|c: char| !" \"'=:".contains(c)).unwrap_or(rest.len());
        let length = rest[value_at..].find(|c: char| c.is_whitespace() || "\"',;)}]".contains(c));
        let end = length.map_or(rest.len(), |length| value_at + length);
        let value = rest[value_at..end].trim_end();
        if !value.is_empty() && value.parse::<f64>().is_err() && !value.contains("[removed") {
            out.push_str(&rest[..value_at]);
            out.push_str(REMOVED);
            rest = &rest[end..];
        }
    }
    out.push_str(rest);
    out
}

const fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '+' | '/' | '=')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_go_and_the_rest_stays() {
        let token = "rl1_0123456789abcdefghjkmnpqrstvwxyz";
        for (line, wanted) in [
            (format!("joined with {token}.\n"), "joined with rl1_[removed]\n".to_owned()),
            ("HF_TOKEN=hf_abcdefghijklmnopqrstuvwx next".into(), "HF_TOKEN=hf_[removed] next".into()),
            ("AWS_SECRET_ACCESS_KEY=x9/zz; a=1".into(), "AWS_SECRET_ACCESS_KEY=[removed]; a=1".into()),
            ("{\"password\": \"pa55word\", \"n\": 1}".into(), "{\"password\": \"[removed]\", \"n\": 1}".into()),
            ("vllm serve m --api-key abc123 --port 1".into(), "vllm serve m --api-key [removed] --port 1".into()),
            ("Authorization: Bearer abcdefghijkl".into(), "Authorization: [removed] Bearer".into()),
            ("max_tokens=16, token: 7".into(), "max_tokens=16, token: 7".into()),
            ("a mask-abcdefghijklmnopqrstuvwxyz".into(), "a mask-abcdefghijklmnopqrstuvwxyz".into()),
        ] {
            let got = scrub(&line);
            if line.starts_with("Authorization") {
                assert!(!got.contains("abcdefghijkl"), "{got}");
            } else {
                assert_eq!(got, wanted);
            }
        }
    }

    #[test]
    fn a_private_key_goes_whole() {
        let text = "a\n-----BEGIN PRIVATE KEY-----\nMIIabc\nxyz\n-----END PRIVATE KEY-----\nb\n";
        assert_eq!(scrub(text), "a\n[removed]\nb\n");
    }

    #[test]
    fn odd_bytes_do_not_matter() {
        let text = "tökén=ü ':=\" token=ß€\u{0}x key: ''";
        assert!(!scrub(text).contains("ß€"));
    }
}
