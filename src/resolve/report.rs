//! Logs the changes of a question's state.

use super::{Purpose, Question, ResolutionState, chain::arrows};
use std::sync::Arc;

/// Logs for one question.
#[derive(Debug)]
pub(super) struct Report {
    question: Arc<Question>,
    /// The last generation seen: a true name that returns after a failure is not a new one.
    generation: u64,
}

impl Report {
    /// `known` needs no log line.
    pub(super) fn new(question: Arc<Question>, known: &ResolutionState) -> Report {
        let generation = known.current.as_ref().map_or(0, |current| current.generation);
        Report { question, generation }
    }

    /// Continues with another question.
    pub(super) fn adopt(&mut self, question: Arc<Question>) {
        self.question = question;
    }

    /// Compares the state that was published with the new one.
    pub(super) fn change(&mut self, old: &ResolutionState, new: &ResolutionState) {
        self.true_name(old, new);
        refusal(&self.question, old, new);
        failure(&self.question, old, new);
    }

    fn true_name(&mut self, old: &ResolutionState, new: &ResolutionState) {
        let alias = &*self.question.alias;
        let [was, is] = [old, new].map(|state| state.current.as_ref().map(|c| &c.true_name));
        if was == is {
            return;
        }
        let Some(current) = &new.current else {
            if new.is_pending() {
                let old = was.map(ToString::to_string);
                tracing::info!(
                    alias,
                    old,
                    "the name to query has changed; the old target is no longer used"
                );
                return;
            }
            tracing::warn!(alias, "the last good answer has expired: no request can be sent");
            return;
        };
        let (true_name, chain) = (&current.true_name, arrows(&current.chain));
        if self.question.purpose == Purpose::DialProxy {
            tracing::info!(alias, proxy = %true_name, addresses = ?current.addresses, "resolved the proxy of `via`");
            self.generation = current.generation;
            return;
        }
        if self.generation != 0 && self.generation != current.generation {
            let old = was.map(ToString::to_string);
            tracing::info!(alias, old, new = %true_name, chain, "new true name");
        } else {
            tracing::info!(alias, %true_name, chain, addresses = ?current.addresses, "resolved");
        }
        self.generation = current.generation;
    }
}

fn refusal(question: &Question, old: &ResolutionState, new: &ResolutionState) {
    let Some(refused) = new.refused.as_ref().filter(|_| old.refused != new.refused) else {
        return;
    };
    let alias = &*question.alias;
    tracing::warn!(alias, "refused: {}; {}", refused.what(), refused.fix());
}

/// Warns when a failure begins and when its reason changes, not at each retry.
fn failure(question: &Question, old: &ResolutionState, new: &ResolutionState) {
    let alias = &*question.alias;
    match (&old.error, &new.error) {
        (_, Some(_)) if new.refused.is_some() => {}
        (old, Some(error)) if old.as_ref() != Some(error) => match &new.current {
            Some(current) => {
                tracing::warn!(alias, true_name = %current.true_name, "serving the last good answer: {error}");
            }
            None => tracing::warn!(alias, "cannot be resolved: {error}"),
        },
        (Some(_), None) if !new.is_pending() => tracing::info!(alias, "DNS responds again"),
        _ => {}
    }
}
