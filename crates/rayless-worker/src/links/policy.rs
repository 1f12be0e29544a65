//! What may carry a link's tensors: the wishes of nodes and drivers, and what becomes of them together.

use rayless_proto::v1::link::{LinkPolicy, LinkTransport};

/// A transport by its name; `Some(None)` is `auto`.
pub fn transport(text: &str) -> Option<Option<LinkTransport>> {
    match text {
        "auto" => Some(None),
        "rdma" => Some(Some(LinkTransport::Rdma)),
        "shm" => Some(Some(LinkTransport::Shm)),
        "tcp" => Some(Some(LinkTransport::Tcp)),
        _ => None,
    }
}

/// A wish of this name was set to something that it cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}=`{value}` is not {wanted}\nhint: correct or unset {name} where the driver runs")]
pub struct BadWish {
    name: String,
    value: String,
    wanted: &'static str,
}

/// What a driver's environment wants of the links of its group: the variables of the node daemon's options.
///
/// # Errors
/// [`BadWish`] for a value that is none.
pub fn wishes_of(env: &[(String, String)]) -> Result<LinkPolicy, BadWish> {
    let bad = |name: &str, value: &str, wanted| BadWish { name: name.to_owned(), value: value.to_owned(), wanted };
    let find = |name: &str| env.iter().find(|(of, value)| of == name && !value.is_empty()).map(|(_, v)| v.as_str());
    let switch = |name: &str| match find(name) {
        None => Ok(None),
        Some(value) => match value.to_ascii_lowercase().as_str() {
            "1" | "true" | "yes" | "on" | "y" | "t" => Ok(Some(true)),
            "0" | "false" | "no" | "off" | "n" | "f" => Ok(Some(false)),
            _ => Err(bad(name, value, "1 or 0")),
        },
    };
    let only = match find("RAYLESS_TRANSPORT") {
        None => None,
        Some(value) => {
            transport(value).ok_or_else(|| bad("RAYLESS_TRANSPORT", value, "one of auto, rdma, shm, tcp"))?
        }
    };
    Ok(LinkPolicy {
        only,
        allow_tcp: switch("RAYLESS_ALLOW_TCP")?,
        encrypt: switch("RAYLESS_ENCRYPT_TENSORS")?.unwrap_or_default(),
        verify: switch("RAYLESS_VERIFY_LINKS")?.unwrap_or_default(),
    })
}

/// Two that cannot both have their way: one line that names them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}\nhint: give both the same --transport (RAYLESS_TRANSPORT), or take one of them away")]
pub struct Contradiction(pub String);

/// The stricter of both in each point. `left` and `right` are named as in `node a`, `the driver`.
///
/// # Errors
/// [`Contradiction`] where no link could follow both.
pub fn together(
    (left, left_name): (&LinkPolicy, &str),
    (right, right_name): (&LinkPolicy, &str),
) -> Result<LinkPolicy, Contradiction> {
    let only = match (left.only, right.only) {
        (Some(a), Some(b)) if a != b => {
            return Err(Contradiction(format!(
                "{left_name} wants --transport {}, {right_name} wants --transport {}",
                a.name(),
                b.name()
            )));
        }
        (a, b) => a.or(b),
    };
    let who = |has: fn(&LinkPolicy) -> bool| if has(left) { left_name } else { right_name };
    let encrypt = left.encrypt || right.encrypt;
    if encrypt && only == Some(LinkTransport::Rdma) {
        return Err(Contradiction(format!(
            "{} wants --transport rdma, {} wants --encrypt-tensors, and RDMA carries tensors in clear",
            who(|policy| policy.only.is_some()),
            who(|policy| policy.encrypt)
        )));
    }
    // A no wins over a yes.
    let allow_tcp = match (left.allow_tcp, right.allow_tcp) {
        (Some(a), Some(b)) => Some(a && b),
        (a, b) => a.or(b),
    };
    if allow_tcp == Some(false) && only == Some(LinkTransport::Tcp) {
        return Err(Contradiction(format!(
            "{} wants --transport tcp, {} forbids TCP (RAYLESS_ALLOW_TCP=0)",
            who(|policy| policy.only.is_some()),
            who(|policy| policy.allow_tcp == Some(false))
        )));
    }
    Ok(LinkPolicy { only, allow_tcp, encrypt, verify: left.verify || right.verify })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn only(transport: LinkTransport) -> LinkPolicy {
        LinkPolicy { only: Some(transport), ..LinkPolicy::default() }
    }

    #[test]
    fn a_drivers_wishes_are_read_and_nonsense_is_named() {
        let wishes =
            wishes_of(&env(&[("RAYLESS_TRANSPORT", "tcp"), ("RAYLESS_ALLOW_TCP", "0"), ("HOME", "/x")])).unwrap();
        assert_eq!((wishes.only, wishes.allow_tcp), (Some(LinkTransport::Tcp), Some(false)));
        assert_eq!(
            wishes_of(&env(&[("RAYLESS_TRANSPORT", "auto"), ("RAYLESS_ALLOW_TCP", "")])),
            Ok(LinkPolicy::default())
        );
        let told = wishes_of(&env(&[("RAYLESS_VERIFY_LINKS", "maybe")])).unwrap_err().to_string();
        assert!(told.starts_with("RAYLESS_VERIFY_LINKS=`maybe` is not 1 or 0\nhint: "), "{told}");
        assert!(wishes_of(&env(&[("RAYLESS_TRANSPORT", "ib")])).is_err());
    }

    #[test]
    fn the_stricter_wish_wins_and_a_contradiction_names_both() {
        let auto = LinkPolicy::default();
        let both = |a: &LinkPolicy, b: &LinkPolicy| together((a, "node a"), (b, "the driver"));
        assert_eq!(both(&auto, &only(LinkTransport::Shm)), Ok(only(LinkTransport::Shm)));
        let strict = LinkPolicy { verify: true, encrypt: true, ..LinkPolicy::default() };
        assert_eq!(both(&strict, &auto), Ok(strict.clone()));
        let no = LinkPolicy { allow_tcp: Some(false), ..LinkPolicy::default() };
        let yes = LinkPolicy { allow_tcp: Some(true), ..LinkPolicy::default() };
        assert_eq!(both(&yes, &no).unwrap().allow_tcp, Some(false));
        assert_eq!(both(&yes, &auto).unwrap().allow_tcp, Some(true));

        let told = both(&only(LinkTransport::Rdma), &only(LinkTransport::Tcp)).unwrap_err().0;
        assert_eq!(told, "node a wants --transport rdma, the driver wants --transport tcp");
        let told = both(&only(LinkTransport::Tcp), &no).unwrap_err().0;
        assert_eq!(told, "node a wants --transport tcp, the driver forbids TCP (RAYLESS_ALLOW_TCP=0)");
        let told = both(&strict, &only(LinkTransport::Rdma)).unwrap_err().0;
        assert!(told.starts_with("the driver wants --transport rdma, node a wants --encrypt-tensors"), "{told}");
    }
}
