//! Every knob, declared once: flag, environment variable, default, unit, text.
//!
//! The command builds its arguments from these, and any listing of them (help, documentation) is made from [`ALL`]. A
//! flag wins over its variable, which wins over the default.

/// One knob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Knob {
    /// Long flag without the dashes; empty where only the environment sets it.
    pub flag: &'static str,
    /// Its environment variable; empty where only a flag sets it.
    pub env: &'static str,
    /// Name of the value in help texts; empty for a switch.
    pub value: &'static str,
    /// The default as text; empty where there is none or `doc` explains it.
    pub default: &'static str,
    /// Unit of the value, empty where it has none.
    pub unit: &'static str,
    /// One sentence for people.
    pub doc: &'static str,
}

macro_rules! knobs {
    ($($(#[doc = $doc:literal])+ $name:ident { flag: $flag:literal, env: $env:literal, value: $value:literal, default: $default:literal, unit: $unit:literal })*) => {
        $(
            $(#[doc = $doc])+
            pub const $name: Knob = Knob {
                flag: $flag, env: $env, value: $value, default: $default, unit: $unit,
                doc: trim(concat!($($doc),+)),
            };
        )*
        /// All of them, in the order of their declaration.
        pub const ALL: &[Knob] = &[$($name),*];
    };
}

/// A doc comment starts with the space after its slashes.
const fn trim(text: &'static str) -> &'static str {
    match text.as_bytes() {
        [b' ', ..] => text.split_at(1).1,
        _ => text,
    }
}

knobs! {
    /// The one port, UDP for membership and TCP for steps; 0 takes a free one
    PORT { flag: "port", env: "RAYLESS_PORT", value: "PORT", default: "6379", unit: "" }
    /// Address or interface that this node uses [default: the interface of the route to the head]
    BIND { flag: "bind", env: "RAYLESS_BIND", value: "IP|INTERFACE", default: "", unit: "" }
    /// Name of this node for people [default: the host name]
    NAME { flag: "name", env: "RAYLESS_NAME", value: "NAME", default: "", unit: "" }
    /// File with the cluster token; wins over RAYLESS_TOKEN
    TOKEN_FILE { flag: "token-file", env: "RAYLESS_TOKEN_FILE", value: "FILE", default: "", unit: "" }
    /// The cluster token; taken out of the environment of every child
    TOKEN { flag: "", env: "RAYLESS_TOKEN", value: "TOKEN", default: "", unit: "" }
    /// GPUs that this node offers, where the driver library does not tell or fewer are meant [default: all found]
    GPUS { flag: "gpus", env: "RAYLESS_GPUS", value: "N", default: "", unit: "" }
    /// CPUs that this node offers [default: those that it may use]
    CPUS { flag: "cpus", env: "RAYLESS_CPUS", value: "N", default: "", unit: "" }
    /// Another resource that this node offers; may be given several times
    RESOURCE { flag: "resource", env: "RAYLESS_RESOURCE", value: "NAME=N", default: "", unit: "" }
    /// Directory of the sockets, keys and logs of this daemon [default: /run/rayless; of users other than root $XDG_RUNTIME_DIR/rayless, else ~/.rayless]
    RUN_DIR { flag: "run-dir", env: "RAYLESS_RUN_DIR", value: "DIR", default: "", unit: "" }
    /// How long to wait for the head, nodes and resources; 0 refuses at once
    WAIT { flag: "wait", env: "RAYLESS_WAIT", value: "SECONDS", default: "600", unit: "s" }
    /// Silence after which a node counts as dead
    DEAD_AFTER { flag: "dead-after", env: "RAYLESS_DEAD_AFTER", value: "SECONDS", default: "3", unit: "s" }
    /// How long a step of an engine may take before its group is ended; 0 for no limit. Of a driver: the value of its own environment wins over its node's
    STEP_DEADLINE { flag: "step-deadline", env: "RAYLESS_STEP_DEADLINE", value: "SECONDS", default: "300", unit: "s" }
    /// A call without progress for so long has its ranks looked into (a driver's knob); 0 for never [default: 10]
    STUCK_AFTER { flag: "", env: "RAYLESS_STUCK_AFTER", value: "SECONDS", default: "10", unit: "s" }
    /// Where heads take turns: `etcd://HOST:PORT[,HOST:PORT…][/NAME]`; the first is the head, the others stand by
    STORE { flag: "store", env: "RAYLESS_STORE", value: "STORE", default: "", unit: "" }
    /// How long a head's lease in the store holds without being renewed: a standby takes over after it
    STORE_LEASE { flag: "store-lease", env: "RAYLESS_STORE_LEASE", value: "SECONDS", default: "3", unit: "s" }
    /// Certificate of the store's authority (PEM): with it the store is spoken to over TLS
    STORE_CA { flag: "store-ca", env: "RAYLESS_STORE_CA", value: "FILE", default: "", unit: "" }
    /// Certificate that is shown to the store (PEM)
    STORE_CERT { flag: "store-cert", env: "RAYLESS_STORE_CERT", value: "FILE", default: "", unit: "" }
    /// Its key (PEM, mode 0600)
    STORE_KEY { flag: "store-key", env: "RAYLESS_STORE_KEY", value: "FILE", default: "", unit: "" }
    /// User of the store
    STORE_USER { flag: "store-user", env: "RAYLESS_STORE_USER", value: "NAME", default: "", unit: "" }
    /// File with that user's password (mode 0600)
    STORE_PASSWORD_FILE { flag: "store-password-file", env: "RAYLESS_STORE_PASSWORD_FILE", value: "FILE", default: "", unit: "" }
    /// Names the host: daemons with the same value share memory [default: boot id and network namespace]
    HOST_ID { flag: "host-id", env: "RAYLESS_HOST_ID", value: "TEXT", default: "", unit: "" }
    /// What moves tensors between this node's workers and others: auto is shared memory on one host, else RDMA
    TRANSPORT { flag: "transport", env: "RAYLESS_TRANSPORT", value: "auto|rdma|shm|tcp", default: "auto", unit: "" }
    /// Let tensors travel over TCP although there are RDMA devices; 0 in the environment forbids it whatever others say
    ALLOW_TCP { flag: "allow-tcp", env: "RAYLESS_ALLOW_TCP", value: "", default: "", unit: "" }
    /// Keep tensors that leave this host within TLS; rules out RDMA
    ENCRYPT_TENSORS { flag: "encrypt-tensors", env: "RAYLESS_ENCRYPT_TENSORS", value: "", default: "", unit: "" }
    /// Let tensors between workers carry checksums
    VERIFY_LINKS { flag: "verify-links", env: "RAYLESS_VERIFY_LINKS", value: "", default: "", unit: "" }
    /// TCP congestion control of links (a driver's knob): a name that the kernel has, or host for the host's own [default: auto, which is the host's, but cubic or reno in the place of bbr]
    TCP_CONGESTION { flag: "", env: "RAYLESS_TCP_CONGESTION", value: "NAME", default: "auto", unit: "" }
    /// Ports on which workers take RDMA connections
    RDMA_PORTS { flag: "rdma-ports", env: "RAYLESS_RDMA_PORTS", value: "FIRST-LAST", default: "6400-6463", unit: "" }
    /// RDMA device that links may use; may be given several times, the preferred first [default: all]
    RDMA_DEVICE { flag: "rdma-device", env: "RAYLESS_RDMA_DEVICE", value: "NAME", default: "", unit: "" }
    /// Free space that /dev/shm must have [default: 16, and 16 more for each GPU found]
    SHM_MIN { flag: "shm-min", env: "RAYLESS_SHM_MIN", value: "MIB", default: "", unit: "MiB" }
    /// What the daemon logs: error, warn, info, debug or trace, also per module
    LOG { flag: "", env: "RAYLESS_LOG", value: "FILTER", default: "info", unit: "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_knob_has_its_twin_and_a_text() {
        for knob in ALL {
            assert!(knob.env.starts_with("RAYLESS_"), "{knob:?}");
            assert!(!knob.doc.is_empty() && !knob.doc.starts_with(' ') && !knob.doc.ends_with('.'), "{knob:?}");
            if !knob.flag.is_empty() {
                assert_eq!(knob.env, format!("RAYLESS_{}", knob.flag.to_uppercase().replace('-', "_")));
            }
        }
    }

    #[test]
    fn a_driver_reads_the_variables_of_the_same_names() {
        for knob in [TRANSPORT, ALLOW_TCP, ENCRYPT_TENSORS, VERIFY_LINKS] {
            let told = rayless_worker::links::wishes_of(&[(knob.env.to_owned(), "neither".to_owned())]).unwrap_err();
            assert!(told.to_string().starts_with(knob.env), "{told}");
        }
    }
}
