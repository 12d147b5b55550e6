//! The `process_*` metrics that every Prometheus client library has, from Linux' `/proc`.

use std::fs;

use metrics::gauge;
use nix::unistd::{SysconfVar, sysconf};

/// Reads them anew; a value that cannot be read is left out.
pub fn record() {
    if let Some(stat) = fs::read_to_string("/proc/self/stat").ok().as_deref().and_then(Stat::parse)
    {
        let ticks = system(SysconfVar::CLK_TCK).unwrap_or(100.0);
        let page = system(SysconfVar::PAGE_SIZE).unwrap_or(4096.0);
        gauge!("process_cpu_seconds_total").set(stat.cpu_ticks / ticks);
        gauge!("process_virtual_memory_bytes").set(stat.virtual_bytes);
        gauge!("process_resident_memory_bytes").set(stat.resident_pages * page);
        gauge!("process_threads").set(stat.threads);
        if let Some(boot) = boot_time() {
            gauge!("process_start_time_seconds").set(boot + stat.start_ticks / ticks);
        }
    }
    if let Ok(descriptors) = fs::read_dir("/proc/self/fd") {
        gauge!("process_open_fds").set(descriptors.count() as f64);
    }
    if let Some(limit) = fs::read_to_string("/proc/self/limits").ok().as_deref().and_then(max_fds) {
        gauge!("process_max_fds").set(limit);
    }
}

struct Stat {
    cpu_ticks: f64,
    threads: f64,
    start_ticks: f64,
    virtual_bytes: f64,
    resident_pages: f64,
}

impl Stat {
    /// proc_pid_stat(5). The second field is the name in parentheses, and may hold anything.
    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        Some(Self {
            cpu_ticks: field(14)? + field(15)?,
            threads: field(20)?,
            start_ticks: field(22)?,
            virtual_bytes: field(23)?,
            resident_pages: field(24)?,
        })
    }
}

fn boot_time() -> Option<f64> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

fn max_fds(limits: &str) -> Option<f64> {
    let line = limits.lines().find(|line| line.starts_with("Max open files"))?;
    line.split_ascii_whitespace().nth(3)?.parse().ok()
}

fn system(variable: SysconfVar) -> Option<f64> {
    sysconf(variable).ok().flatten().map(|value| value as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_with_parentheses_and_spaces_does_not_shift_the_fields() {
        let text = "7 (a) b (c) S 1 1 1 0 -1 0 0 0 0 0 12 30 0 0 20 0 5 0 900 4096 10 0";
        let stat = Stat::parse(text).unwrap();
        assert_eq!((stat.cpu_ticks, stat.threads), (42.0, 5.0));
        assert_eq!(
            (stat.start_ticks, stat.virtual_bytes, stat.resident_pages),
            (900.0, 4096.0, 10.0)
        );
    }

    #[test]
    fn the_limit_of_open_files_is_the_soft_one() {
        let text = "Limit   Soft  Hard Units\nMax open files            1024                 524288               files\n";
        assert_eq!(max_fds(text), Some(1024.0));
    }
}
