//! The live aliases, from one configuration to the next.

use std::{collections::HashMap, sync::Arc};

use arc_swap::ArcSwap;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Alias, AliasState, Target, TargetKey, credentials::ProxyCredentials, material::Material,
};
use crate::{
    config,
    connect::AddressPolicy,
    resolve::{Environment, Resolver, names},
    tls::{RootStores, TlsConfigErrors},
};

/// The live aliases. Owned by the control thread.
///
/// A configuration is applied in two steps: [`Inventory::plan`] makes its aliases, which may fail and takes time,
/// and [`commit`](Self::commit) puts them in use, which does neither.
pub struct Registry {
    resolver: Arc<Resolver>,
    policy: Arc<ArcSwap<AddressPolicy>>,
    workers: usize,
    running: Vec<Running>,
}

struct Running {
    alias: Arc<Alias>,
    /// Ends the background task of these settings.
    stop: CancellationToken,
}

/// What exists already, for a plan.
#[derive(Clone)]
pub struct Inventory {
    resolver: Arc<Resolver>,
    policy: Arc<ArcSwap<AddressPolicy>>,
    workers: usize,
    aliases: HashMap<String, Arc<Alias>>,
}

impl Registry {
    /// Without aliases, and with pools for this many workers.
    pub fn new(
        resolver: Arc<Resolver>,
        policy: Arc<ArcSwap<AddressPolicy>>,
        workers: usize,
    ) -> Self {
        Self { resolver, policy, workers, running: Vec::new() }
    }

    /// Where names are resolved.
    pub fn resolver(&self) -> &Arc<Resolver> {
        &self.resolver
    }

    /// What exists already, for a plan.
    pub fn inventory(&self) -> Inventory {
        let aliases = self.running.iter().map(|running| &running.alias);
        Inventory {
            resolver: self.resolver.clone(),
            policy: self.policy.clone(),
            workers: self.workers,
            aliases: aliases.map(|alias| (alias.config().name.clone(), alias.clone())).collect(),
        }
    }

    /// Replaces all aliases by `aliases`, which were planned from the current inventory. What is removed ends as
    /// `on_change` says.
    ///
    /// Must run in the control thread's runtime. Nothing is dialled.
    pub fn commit(&mut self, aliases: &[Arc<Alias>], dns: &config::Dns) {
        let new_dns = *self.resolver.settings() != *dns;
        if new_dns {
            self.resolver.configure(dns.clone());
        }
        let mut before: HashMap<String, Running> = std::mem::take(&mut self.running)
            .into_iter()
            .map(|running| (running.alias.config().name.clone(), running))
            .collect();
        for alias in aliases {
            let old = before.remove(&alias.config().name);
            let running = match old {
                Some(same) if Arc::ptr_eq(&same.alias, alias) => {
                    if new_dns {
                        alias.put_to_work(&self.resolver);
                    }
                    same
                }
                old => self.replace(old, alias),
            };
            self.running.push(running);
        }
        for old in before.into_values() {
            old.stop.cancel();
            old.alias.report_ended_failures();
            old.alias.targets().iter().for_each(|target| old.alias.leave(target));
        }
    }

    /// Puts an alias in use, in place of the one with the same name.
    fn replace(&self, old: Option<Running>, alias: &Arc<Alias>) -> Running {
        if let Some(old) = &old {
            old.stop.cancel();
            old.alias.report_ended_failures();
            alias.state().configure(alias.config());
        }
        alias.put_to_work(&self.resolver);
        let left = old.iter().flat_map(|old| old.alias.targets());
        for target in left.filter(|target| !alias.has_target(target)) {
            alias.leave(target);
        }
        let stop = CancellationToken::new();
        tokio::spawn(alias.clone().run(stop.clone()));
        Running { alias: alias.clone(), stop }
    }
}

/// At the end of a process, or of a library's client, no connection is used again; those in use continue.
impl Drop for Registry {
    fn drop(&mut self) {
        for Running { alias, stop } in &self.running {
            stop.cancel();
            for target in alias.targets() {
                target.ask_no_more();
                target.generations().for_each(|generation| generation.retire());
            }
            alias.state().workers.iter().for_each(|w| w.pool.reap(Instant::now(), |_| false));
        }
    }
}

impl Inventory {
    /// How names are resolved with these settings.
    pub fn environment(&self, dns: &config::Dns) -> Environment {
        self.resolver.environment_with(dns)
    }

    /// Makes the aliases of a configuration, each with the state of its name and its targets. An unchanged alias is
    /// reused. `Err` names the alias that failed.
    ///
    /// Blocking, because certificates are read.
    pub fn plan(
        &self,
        configs: &[config::Alias],
        dns: &config::Dns,
    ) -> Result<Vec<Arc<Alias>>, (String, TlsConfigErrors)> {
        let environment = self.environment(dns);
        let mut roots = RootStores::default();
        let mut aliases = Vec::with_capacity(configs.len());
        for config in configs {
            let old = self.aliases.get(&config.name);
            let hosts = names::of_alias(config, &environment);
            if let Some(same) = old.filter(|old| **old.config() == *config && old.hosts() == hosts)
            {
                aliases.push(same.clone());
                continue;
            }
            let alias = self.alias(config, hosts, old, &mut roots);
            aliases.push(alias.map_err(|error| (config.name.clone(), error))?);
        }
        Ok(aliases)
    }

    fn alias(
        &self,
        config: &config::Alias,
        hosts: Vec<String>,
        old: Option<&Arc<Alias>>,
        roots: &mut RootStores,
    ) -> Result<Arc<Alias>, TlsConfigErrors> {
        let material = match old.filter(|old| old.material.is_of(config)) {
            Some(old) => old.material.clone(),
            None => Arc::new(Material::load(config, roots)?),
        };
        let mut known: Vec<&Arc<Target>> = old.iter().flat_map(|old| old.targets()).collect();
        // One that is named twice is two.
        let mut target = |key: TargetKey| match known.iter().position(|old| *old.key() == key) {
            Some(index) => known.swap_remove(index).clone(),
            None => Target::new(key),
        };
        Ok(Arc::new(Alias {
            hosts,
            targets: TargetKey::of_alias(config).map(&mut target).collect(),
            material,
            credentials: match old.filter(|old| old.credentials.is_of(config)) {
                Some(old) => old.credentials.clone(),
                None => Arc::new(ProxyCredentials::load(config)),
            },
            policy: self.policy.clone(),
            state: match old {
                Some(old) => old.state.clone(),
                None => AliasState::new(config, self.workers),
            },
            config: Arc::new(config.clone()),
        }))
    }
}
