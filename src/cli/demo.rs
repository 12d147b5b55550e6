//! `truename demo`: demonstrates everything on one machine.

use std::{
    io::{self, Write},
    pin::pin,
    process::ExitCode,
};

use futures_util::future::select_all;
use tokio::{
    runtime,
    signal::unix::{SignalKind, signal},
};

use super::signals::{FATAL, arrivals, outlive_file_size_limit};
use crate::{
    app::App,
    command::StartError,
    demo::{
        page::Page,
        story::{self, Story},
        world::{ADDRESSES, ALIAS, DATABASE, REGIONS, TRUE_NAME, World, WorldError},
    },
    telemetry,
    tls::store::Store,
};

/// Show the whole thing on this machine, offline: cluster DNS, TLS servers and the proxy
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Demo {
    /// Exit at the end: 0 if every claim held, else 1
    #[arg(long)]
    pub once: bool,
}

impl Demo {
    /// Runs the demo to its end.
    pub fn run(&self) -> ExitCode {
        match self.play() {
            Ok(story) if story.held() => ExitCode::SUCCESS,
            Ok(_) => ExitCode::FAILURE,
            // Ctrl-C is the normal end of the demo, except with `--once`, which promises a result.
            Err(DemoError::Interrupted) if !self.once => ExitCode::SUCCESS,
            // `truename demo | head` read as much as it wanted.
            Err(DemoError::Page(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                ExitCode::SUCCESS
            }
            Err(error) => {
                telemetry::say(format_args!("truename demo: {error}"));
                ExitCode::FAILURE
            }
        }
    }

    fn play(&self) -> Result<Story, DemoError> {
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(DemoError::Runtime)?.block_on(self.perform())
    }

    async fn perform(&self) -> Result<Story, DemoError> {
        // Before there is a folder with keys, so that an early signal is handled.
        let mut signals = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()]
            .map(signal)
            .into_iter()
            .collect::<Result<Vec<_>, _>>()
            .map_err(DemoError::Runtime)?;
        let mut fatal = arrivals(&FATAL).map_err(DemoError::Runtime)?;
        outlive_file_size_limit().map_err(DemoError::Runtime)?;
        let mut stopped = pin!(async {
            let ending = select_all(signals.iter_mut().map(|signal| Box::pin(signal.recv())));
            tokio::select! {
                _ = ending => {}
                Some(_) = fatal.recv() => {}
            }
        });

        let world = &World::start()?;
        let proxy = App::start(world.config())?;
        let story = tokio::select! {
            story = self.tell(world, &proxy) => story,
            () = &mut stopped => Err(DemoError::Interrupted),
        };
        if story.is_ok() && !self.once {
            stopped.await;
        }
        proxy.shutdown().await;
        story
    }

    async fn tell(&self, world: &World, proxy: &App) -> Result<Story, DemoError> {
        let &[address, database] = proxy.listeners() else {
            return Err(DemoError::NotListening);
        };
        let forward = proxy.proxy().ok_or(DemoError::NotListening)?;
        let root = Store::at(&world.authority_folder()).roots_file();
        let roots = story::roots(&root).map_err(|_| DemoError::NoAuthority)?;
        let proxy = story::Proxy { alias: address, forward, roots, database };
        let mut page = Page::stdout();
        introduce(world, &proxy, &mut page)?;
        let mut story = story::tell(world, &proxy, &mut page).await?;
        story::tell_of_database(world, proxy.database, &mut page, &mut story).await?;
        conclude(&story, &mut page)?;
        if !self.once {
            story::curl_lines(world, &proxy, &mut page)?;
        }
        Ok(story)
    }
}

fn introduce(world: &World, proxy: &story::Proxy, page: &mut Page<impl Write>) -> io::Result<()> {
    let (database, proxy) = (proxy.database, proxy.alias);
    page.chapter("A small world on this machine: no internet, no root, free ports")?;
    page.line(&format!("the cluster's DNS  {}", world.dns().address()))?;
    let [first, .., last] = ADDRESSES;
    page.line(&format!(
        "{TRUE_NAME:<17}  {first} to {last}, port {}, with a certificate for {TRUE_NAME} only",
        world.port()
    ))?;
    for region in REGIONS {
        let (name, address, port) = (region.true_name, region.address, world.database_port());
        page.line(&format!("{name}  {address}, port {port}, a database that takes TLS only"))?;
    }
    page.line(&format!(
        "truename           {proxy}, for the alias {ALIAS}, and {database} for {DATABASE}"
    ))
}

fn conclude(story: &Story, page: &mut Page<impl Write>) -> io::Result<()> {
    let failures = story.failures().count();
    if failures == 0 {
        page.chapter(&format!("All {} claims held.", story.len()))
    } else {
        page.chapter(&format!("{failures} of {} claims failed.", story.len()))?;
        for failure in story.failures() {
            page.line(failure)?;
        }
        Ok(())
    }
}

/// Why the demo failed.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error(transparent)]
    World(#[from] WorldError),
    #[error("cannot run: {0}")]
    Runtime(io::Error),
    #[error("cannot start the proxy: {0}")]
    Proxy(#[from] StartError),
    #[error("the proxy started, but is not listening")]
    NotListening,
    #[error("the proxy started without a local certificate authority")]
    NoAuthority,
    #[error("cannot write: {0}")]
    Page(#[from] io::Error),
    #[error("interrupted before the end")]
    Interrupted,
}
