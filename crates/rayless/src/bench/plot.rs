//! The results as a picture: latency over size and bandwidth over size, both on logarithmic scales.

use super::{measure::Point, report::Measured, sizes::shown};
use rayless_fabric::Level;
use std::fmt::Write as _;

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 380.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 60.0;
const RIGHT: f64 = 20.0;

/// A panel: what it shows of a point, and its name.
struct Panel {
    title: &'static str,
    of: fn(&Point) -> f64,
    /// A second, dashed line.
    and: Option<fn(&Point) -> f64>,
    at: f64,
}

/// An SVG picture of its own, without script, font or style from elsewhere.
pub(super) fn svg(results: &[Measured]) -> String {
    let panels = [
        Panel { title: "one hop: p50, p99 dashed (us)", of: |p| p.latency.p50, and: Some(|p| p.latency.p99), at: 0.0 },
        Panel { title: "a stream one way (GB/s)", of: |p| p.gigabytes_per_s, and: None, at: WIDTH },
    ];
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        2.0 * WIDTH
    );
    let lines: Vec<(Level, &[Point])> = results
        .iter()
        .filter_map(|measured| Some((measured.level, measured.points.as_deref().ok().filter(|p| !p.is_empty())?)))
        .collect();
    for panel in &panels {
        panel.draw(&lines, &mut out);
    }
    out.push_str("</svg>\n");
    out
}

impl Panel {
    fn draw(&self, lines: &[(Level, &[Point])], out: &mut String) {
        let points = || lines.iter().flat_map(|(_, points)| points.iter());
        let values = points().flat_map(|p| std::iter::once((self.of)(p)).chain(self.and.map(|and| and(p))));
        let Some((low, high)) = bounds(values, 10.0) else { return };
        let Some((least, most)) = bounds(points().map(|p| p.bytes as f64), 2.0) else { return };
        let x = |bytes: f64| self.at + LEFT + (WIDTH - LEFT - RIGHT) * share(bytes, least, most);
        let y = |value: f64| HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share(value, low, high);
        // Writing to a String cannot fail.
        let mut text = |at_x: f64, at_y: f64, anchor: &str, words: &str| {
            let _ = writeln!(out, "<text x=\"{at_x:.1}\" y=\"{at_y:.1}\" text-anchor=\"{anchor}\">{words}</text>");
        };
        text(x(least), 24.0, "start", self.title);
        for (at, (level, _)) in lines.iter().enumerate() {
            text(x(most) - 60.0 * (lines.len() - 1 - at) as f64 - 4.0, 42.0, "end", level.name());
        }
        let mut grid = String::new();
        for value in steps(low, high, 10.0) {
            text(x(least) - 8.0, y(value) + 4.0, "end", &format!("{value}"));
            let _ = writeln!(grid, "M{:.1} {:.1}H{:.1}", x(least), y(value), x(most));
        }
        for bytes in steps(least, most, 16.0) {
            text(x(bytes), HEIGHT - BOTTOM + 20.0, "middle", &shown(bytes as u64));
            let _ = writeln!(grid, "M{:.1} {:.1}V{:.1}", x(bytes), y(low), y(high));
        }
        text(x(least.mul_add(most, 0.0).sqrt()), HEIGHT - 14.0, "middle", "bytes of a message (two tensors)");
        let _ = writeln!(out, "<path d=\"{}\" stroke=\"#dddddd\" fill=\"none\"/>", grid.trim().replace('\n', ""));
        for (at, (level, points)) in lines.iter().enumerate() {
            let color = color(*level);
            let swatch = x(most) - 60.0 * (lines.len() - 1 - at) as f64 - 46.0;
            let _ = writeln!(out, "<path d=\"M{swatch:.1} 38h12\" stroke=\"{color}\" stroke-width=\"2\"/>");
            let mut line = |of: fn(&Point) -> f64, dash: &str| {
                let path: Vec<String> =
                    points.iter().map(|p| format!("{:.1} {:.1}", x(p.bytes as f64), y(of(p)))).collect();
                let path = path.join("L");
                let _ =
                    writeln!(out, "<path d=\"M{path}\" stroke=\"{color}\" stroke-width=\"2\" fill=\"none\"{dash}/>");
            };
            line(self.of, "");
            if let Some(and) = self.and {
                line(and, " stroke-dasharray=\"5 4\"");
            }
        }
    }
}

/// Dark enough on white, and apart for those who see few colours; the names stand beside them.
const fn color(level: Level) -> &'static str {
    match level {
        Level::Shm => "#0072b2",
        Level::Rdma => "#d55e00",
        Level::Tcp => "#009e73",
    }
}

/// The powers of `base` around all values; `None`: there is none to draw.
fn bounds(values: impl Iterator<Item = f64>, base: f64) -> Option<(f64, f64)> {
    let (low, high) = values
        .filter(|value| value.is_finite() && *value > 0.0)
        .fold((f64::INFINITY, 0.0f64), |(low, high), value| (low.min(value), high.max(value)));
    let power = |value: f64, round: fn(f64) -> f64| base.powf(round(value.log(base)));
    (high > 0.0).then(|| (power(low, f64::floor), power(high, f64::ceil).max(power(low, f64::floor) * base)))
}

/// Where between the bounds a value lies; one that no scale shows (0) lies at the lower.
fn share(value: f64, low: f64, high: f64) -> f64 {
    ((value.max(low) / low).ln() / (high / low).ln()).clamp(0.0, 1.0)
}

fn steps(low: f64, high: f64, factor: f64) -> impl Iterator<Item = f64> {
    std::iter::successors(Some(low), move |at| Some(at * factor)).take_while(move |at| *at <= high * 1.001)
}

#[cfg(test)]
mod tests {
    use super::{super::report::tests::sample, *};

    #[test]
    fn every_transport_with_points_has_its_lines() {
        let picture = svg(&sample());
        // p50 and p99 in one panel, bandwidth in the other.
        assert_eq!(picture.matches("stroke=\"#0072b2\" stroke-width=\"2\" fill").count(), 3);
        assert!(!picture.contains(color(Level::Rdma)) && !picture.contains("NaN") && !picture.contains("inf"));
        assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n"));
        let opened = picture.matches("<text").count();
        assert_eq!(opened, picture.matches("</text>").count());
    }

    #[test]
    fn nothing_measured_is_an_empty_picture_and_no_panic() {
        assert!(svg(&[]).ends_with("</svg>\n"));
    }
}
