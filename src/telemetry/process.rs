//! The `process_*` metrics that every Prometheus client library has, from Linux' `/proc`.

use std::{fmt::Write, fs};

use nix::unistd::{SysconfVar, sysconf};

/// Reads the current values and writes them in the text format. Values that cannot be read are omitted.
///
/// Not through the recorder, whose counters are integers: CPU time is not.
pub fn write(out: &mut String) {
    if let Some(stat) = fs::read_to_string("/proc/self/stat").ok().as_deref().and_then(Stat::parse)
    {
        let ticks = system(SysconfVar::CLK_TCK).unwrap_or(100.0);
        let page = system(SysconfVar::PAGE_SIZE).unwrap_or(4096.0);
        let cpu = stat.cpu_ticks / ticks;
        family(out, "process_cpu_seconds_total", "counter", "User and system CPU time.", cpu);
        let virtual_bytes = stat.virtual_bytes;
        family(out, "process_virtual_memory_bytes", "gauge", "Virtual memory.", virtual_bytes);
        let resident = stat.resident_pages * page;
        family(out, "process_resident_memory_bytes", "gauge", "Resident memory.", resident);
        family(out, "process_threads", "gauge", "Threads.", stat.threads);
        if let Some(boot) = boot_time() {
            let started = boot + stat.start_ticks / ticks;
            family(out, "process_start_time_seconds", "gauge", "Start, in Unix time.", started);
        }
    }
    if let Ok(descriptors) = fs::read_dir("/proc/self/fd") {
        let open = descriptors.count() as f64;
        family(out, "process_open_fds", "gauge", "Open file descriptors.", open);
    }
    if let Some(limit) = fs::read_to_string("/proc/self/limits").ok().as_deref().and_then(max_fds) {
        family(out, "process_max_fds", "gauge", "Most file descriptors allowed.", limit);
    }
}

fn family(out: &mut String, name: &str, kind: &str, help: &str, value: f64) {
    let _ = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n\n");
}

struct Stat {
    cpu_ticks: f64,
    threads: f64,
    start_ticks: f64,
    virtual_bytes: f64,
    resident_pages: f64,
}

impl Stat {
    /// proc_pid_stat(5). The second field is the name in parentheses, which may contain anything.
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
