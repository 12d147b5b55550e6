//! The root certificates that an alias trusts, parsed once however many aliases trust them.

/// Root stores already parsed during one load, so that aliases with equal trust share one.
///
/// Keep it for the length of a load and drop it then: the next load reads the files anew.
#[derive(Default)]
pub struct RootStores {}
