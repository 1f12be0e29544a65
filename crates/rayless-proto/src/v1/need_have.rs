//! The need/have table as plain text: what a launch that waits, or was refused for want of resources, shows to people.

use super::control::{NeedHave, NeedHaveRow};
use crate::resources::Resources;
use std::fmt;

impl fmt::Display for NeedHave {
    /// Several lines without a line end at the last: the cause, the need, and a row per node with who holds what.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plural = if self.bundles == 1 { "" } else { "s" };
        write!(f, "{}\nneed  {} in {} bundle{plural}", self.cause, quantities(&self.need), self.bundles)?;
        if self.rows.is_empty() {
            return write!(f, "\nhave  no node yet");
        }
        let mut rows = vec![["node", "state", "free", "total", "held by"].map(str::to_owned)];
        rows.extend(self.rows.iter().map(|row| {
            let [free, total] = [&row.available, &row.total].map(|resources| self.of_need(resources));
            [row.node.clone(), row.state.clone(), free, total, holders(row)]
        }));
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
        let widths = [0, 1, 2, 3].map(width);
        for row in &rows {
            let mut line = String::from("  ");
            for (cell, width) in row.iter().zip(widths) {
                line.push_str(&format!("{cell:width$}  "));
            }
            line.push_str(&row[4]);
            write!(f, "\n{}", line.trim_end())?;
        }
        Ok(())
    }
}

impl NeedHave {
    /// The quantities of those resources that the launch asks for: the rest would only hide what is short.
    fn of_need(&self, have: &Resources) -> String {
        let mut shown: Vec<String> = self.need.iter().map(|(name, _)| format!("{name} {}", have.get(name))).collect();
        if shown.is_empty() {
            shown.push("-".to_owned());
        }
        shown.join(", ")
    }
}

fn quantities(resources: &Resources) -> String {
    if resources.is_empty() {
        return "nothing".to_owned();
    }
    resources.iter().map(|(name, quantity)| format!("{name} {quantity}")).collect::<Vec<_>>().join(", ")
}

/// `GPU 0: demo, GPU 1: demo; demo`: devices first, then holders of other resources.
fn holders(row: &NeedHaveRow) -> String {
    let devices: Vec<String> =
        row.held.iter().filter_map(|(gpu, who)| gpu.map(|index| format!("GPU {index}: {who}"))).collect();
    let others: Vec<&str> = row.held.iter().filter(|(gpu, _)| gpu.is_none()).map(|(_, who)| who.as_str()).collect();
    [devices.join(", "), others.join(", ")].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resources::{CPU, GPU, Quantity};

    #[test]
    fn shows_what_is_short_and_who_has_it() {
        let two = Resources::new().with(GPU, Quantity::whole(2)).with(CPU, Quantity::whole(8));
        let table = NeedHave {
            cause: "16 GPUs needed, 1 free".into(),
            need: Resources::new().with(GPU, Quantity::whole(16)),
            bundles: 16,
            rows: vec![
                NeedHaveRow {
                    node: "node-a".into(),
                    state: "alive".into(),
                    total: two.clone(),
                    available: Resources::new().with(GPU, Quantity::ONE),
                    held: vec![(Some(0), "demo".into()), (None, "other".into())],
                },
                NeedHaveRow {
                    node: "b".into(),
                    state: "suspect".into(),
                    total: two,
                    available: Resources::new(),
                    held: Vec::new(),
                },
            ],
        };
        assert_eq!(
            table.to_string(),
            "16 GPUs needed, 1 free\n\
             need  GPU 16 in 16 bundles\n\
             \x20 node    state    free   total  held by\n\
             \x20 node-a  alive    GPU 1  GPU 2  GPU 0: demo; other\n\
             \x20 b       suspect  GPU 0  GPU 2"
        );
    }
}
