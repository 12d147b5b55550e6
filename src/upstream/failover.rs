//! Which target a request goes to.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::{Alias, Generation, NoTarget, Target};
use crate::fault::{Blame, Fault};

impl Alias {
    /// The target that new requests go to: the first with a usable endpoint.
    ///
    /// Waits only while DNS has not responded yet, and no longer than `timeouts.connect`: as long for each of
    /// several targets as for a single one.
    pub async fn target(&self) -> Result<Arc<Generation>, NoTarget> {
        if let Some(generation) = self.choose() {
            return Ok(generation);
        }
        let limit = self.config.timeouts.connect;
        let deadline = Instant::now() + limit;
        while let Some(pending) = self.pending() {
            // The targets after it were being resolved all along.
            if !pending.wait_for_dns(deadline).await && !self.pass_over(pending) {
                return Err(NoTarget::Pending(limit));
            }
            if let Some(generation) = self.choose() {
                return Ok(generation);
            }
        }
        // Requests fail until DNS has something new: this has it asked sooner.
        self.refresh();
        Err(self.lack())
    }

    /// Asks DNS again soon, because the known endpoints do not work.
    pub fn refresh(&self) {
        self.targets.iter().for_each(|target| target.refresh());
    }

    /// The target for requests now; none if DNS has not responded yet for an earlier target, or for any.
    fn choose(&self) -> Option<Arc<Generation>> {
        if let [only] = self.targets.as_slice() {
            return only.generation.load_full();
        }
        let now = Instant::now();
        let (left, in_order) = self.targets.split_at(self.active(now));
        for target in in_order {
            match target.generation.load_full() {
                Some(generation) if generation.balancer().has_healthy(now) => {
                    return Some(generation);
                }
                None if target.is_pending() => return None,
                _ => {}
            }
        }
        let known = || left.iter().filter_map(|target| target.generation.load_full());
        let healthy = known().find(|generation| generation.balancer().has_healthy(now));
        let unhealthy = || in_order.iter().find_map(|target| target.generation.load_full());
        healthy.or_else(unhealthy).or_else(|| known().next())
    }

    /// A later target than that of `generation`, with a usable endpoint: a request's last attempt goes there. Waits
    /// only while DNS has not responded for it.
    pub async fn behind(&self, generation: &Generation) -> Option<Arc<Generation>> {
        let deadline = Instant::now() + self.config.timeouts.connect;
        let index = self.position(generation.target())?;
        for target in &self.targets[index + 1..] {
            if target.is_pending() {
                target.wait_for_dns(deadline).await;
            }
            let generation = target.generation.load_full();
            if let Some(usable) = generation.filter(|g| g.balancer().has_healthy(Instant::now())) {
                return Some(usable);
            }
        }
        None
    }

    /// A request has failed at all these endpoints, at last by `fault`. If the target has no other, or another would
    /// not help, later requests go to the next target for a while, or to the first if this one is the last.
    pub fn failed_at(&self, generation: &Generation, tried: &[SocketAddr], fault: &Fault) {
        let now = Instant::now();
        let may_help = fault.blame() != Blame::Target;
        if self.targets.len() < 2 || may_help && generation.balancer().has_untried(now, tried) {
            return;
        }
        let Some(index) = self.position(generation.target()) else { return };
        let next = self.targets.get(index + 1);
        let current = self.active(now);
        if current <= index {
            self.activate(current, next, self.config.health.passive.eject, now);
        }
        if let Some(generation) = next.and_then(|next| next.generation.load_full()) {
            tracing::debug!(
                alias = self.config.name,
                true_name = generation.true_name().as_str(),
                "requests go to the next target",
            );
        }
    }

    /// Whether `next` may have a connection after `fault` at an endpoint of `generation`.
    pub fn is_elsewhere(
        next: &Arc<Generation>,
        generation: &Arc<Generation>,
        tried: &[SocketAddr],
        fault: &Fault,
    ) -> bool {
        match fault.blame() {
            // Its other endpoints are as good: those of a proxy that cannot reach it, for instance.
            Blame::Target => next.target() != generation.target(),
            _ => {
                !Arc::ptr_eq(next, generation) || next.balancer().has_untried(Instant::now(), tried)
            }
        }
    }

    /// DNS has not responded for a target for too long. Returns whether there is a later one, which is then used.
    fn pass_over(&self, target: &Target) -> bool {
        let now = Instant::now();
        let Some(index) = self.position(target.number()) else { return false };
        let Some(next) = self.targets.get(index + 1) else { return false };
        self.activate(self.active(now), Some(next), self.config.timeouts.connect, now);
        true
    }

    /// The first target in order for which DNS has not responded yet.
    fn pending(&self) -> Option<&Arc<Target>> {
        self.targets[self.active(Instant::now())..].iter().find(|target| target.is_pending())
    }

    /// The index of the target that the order begins with now.
    fn active(&self, now: Instant) -> usize {
        self.state.active.get(now).and_then(|number| self.position(number)).unwrap_or(0)
    }

    fn activate(&self, current: usize, next: Option<&Arc<Target>>, time: Duration, now: Instant) {
        let number = |index: usize| (index > 0).then(|| self.targets[index].number());
        self.state.active.change(number(current), next.map(|next| next.number()), time, now);
    }

    fn position(&self, number: u32) -> Option<usize> {
        self.targets.iter().position(|target| target.number() == number)
    }

    /// Why there is no target.
    fn lack(&self) -> NoTarget {
        if let Some(error) = self.targets.iter().find_map(|target| target.unusable.load_full()) {
            return NoTarget::Unusable(error);
        }
        let state = self.targets[0].applied();
        match (&state.refused, &state.error) {
            (Some(refusal), _) => NoTarget::Refused(refusal.clone()),
            (None, Some(error)) => NoTarget::Resolve(error.clone()),
            (None, None) => NoTarget::Pending(self.config.timeouts.connect),
        }
    }
}
