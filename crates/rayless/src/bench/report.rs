//! The results as a table for people and as JSON for programs.

use super::{LinkOptions, measure::Point, sizes::shown};
use rayless_fabric::Level;

/// One transport's results.
pub(super) struct Measured {
    pub(super) level: Level,
    pub(super) device: Option<String>,
    /// shm: `cma` or `ring`.
    pub(super) mode: Option<String>,
    /// By size; or why there are none.
    pub(super) points: Result<Vec<Point>, String>,
}

/// The lines above a transport's rows.
pub(super) fn heading(level: Level, device: Option<&str>, mode: Option<&str>, peer: &str) -> String {
    let mode = mode.map_or_else(String::new, |mode| format!(" ({mode})"));
    let over = device.map_or_else(String::new, |device| format!(" over {device}"));
    format!(
        "{level}{mode}{over}, with {peer}\n{:>10} {:>12} {:>12} {:>12} {:>10} {:>10} {:>9}",
        "size", "p50 (us)", "p99 (us)", "p99.9 (us)", "hops", "GB/s", "messages"
    )
}

/// A row: the latency of a hop, half of a round trip, and what a stream one way carries.
pub(super) fn row(point: &Point) -> String {
    let Point { bytes, hops, latency, gigabytes_per_s, messages } = point;
    format!(
        "{:>10} {:>12.1} {:>12.1} {:>12.1} {hops:>10} {gigabytes_per_s:>10.3} {messages:>9}",
        shown(*bytes),
        latency.p50,
        latency.p99,
        latency.p999
    )
}

/// `{"peer", "streams", "verified", "seconds", "transports": [{"transport", "mode", "device", "rejected" | "points": […]}]}`
pub(super) fn json(results: &[Measured], peer: &str, options: &LinkOptions) -> String {
    let transports: Vec<String> = results.iter().map(transport).collect();
    format!(
        "{{\"peer\":{},\"streams\":{},\"verified\":{},\"seconds\":{},\"transports\":[{}]}}",
        quoted(peer),
        options.streams,
        options.verify,
        options.time.as_secs_f64(),
        transports.join(",")
    )
}

fn transport(measured: &Measured) -> String {
    let device = measured.device.as_deref().map_or_else(|| "null".to_owned(), quoted);
    let mode = measured.mode.as_deref().map_or_else(|| "null".to_owned(), quoted);
    let outcome = match &measured.points {
        Err(reason) => format!("\"rejected\":{}", quoted(reason)),
        Ok(points) => {
            let points: Vec<String> = points.iter().map(point).collect();
            format!("\"points\":[{}]", points.join(","))
        }
    };
    format!("{{\"transport\":\"{}\",\"mode\":{mode},\"device\":{device},{outcome}}}", measured.level)
}

fn point(point: &Point) -> String {
    let Point { bytes, hops, latency, gigabytes_per_s, messages } = point;
    format!(
        "{{\"bytes\":{bytes},\"hops\":{hops},\"latency_us\":{{\"min\":{:.3},\"mean\":{:.3},\"p50\":{:.3},\"p99\":{:.3},\"p99.9\":{:.3},\"max\":{:.3}}},\
         \"messages\":{messages},\"gigabytes_per_s\":{gigabytes_per_s:.9}}}",
        latency.min, latency.mean, latency.p50, latency.p99, latency.p999, latency.max
    )
}

fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if c.is_control() => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
pub(super) mod tests {
    use super::{super::measure::Latency, *};
    use crate::bench::Side;
    use std::time::Duration;

    pub(in super::super) fn sample() -> Vec<Measured> {
        let latency = Latency { min: 1.0, mean: 2.5, p50: 2.0, p99: 8.0, p999: 30.0, max: 70.0 };
        let at = |bytes: u64| Point { bytes, hops: 7, latency, gigabytes_per_s: 0.5, messages: 4 };
        vec![
            Measured {
                level: Level::Shm,
                device: None,
                mode: Some("cma".into()),
                points: Ok(vec![at(1), at(28 << 10)]),
            },
            Measured {
                level: Level::Rdma,
                device: Some("siw0".into()),
                mode: None,
                points: Err("no \"device\"\n".into()),
            },
        ]
    }

    #[test]
    fn the_json_is_json_and_has_every_number() {
        let options = LinkOptions {
            side: Side::OneHost,
            transports: vec![],
            sizes: vec![1],
            time: Duration::from_millis(500),
            streams: 2,
            verify: true,
            stall: Duration::from_secs(60),
            rdma_address: None,
            json: true,
            plot: None,
            token_file: None,
        };
        let read: serde_json::Value = serde_json::from_str(&json(&sample(), "peer", &options)).unwrap();
        assert_eq!((&read["seconds"], &read["streams"], &read["verified"]), (&0.5.into(), &2.into(), &true.into()));
        let shm = &read["transports"][0];
        assert_eq!((&shm["transport"], &shm["device"]), (&"shm".into(), &serde_json::Value::Null));
        assert_eq!(shm["mode"], "cma");
        assert_eq!(shm["points"][1]["latency_us"]["p99.9"], 30.0);
        assert_eq!(shm["points"][1]["bytes"], 28 << 10);
        assert_eq!(read["transports"][1]["rejected"], "no \"device\"\n");
    }

    #[test]
    fn rows_stand_under_their_headings() {
        let Ok(points) = &sample()[0].points else { panic!() };
        let heading = heading(Level::Shm, None, Some("cma"), "another process of this host");
        assert_eq!(heading.lines().last().unwrap().len(), row(&points[1]).len());
    }
}
