"""What is refused of a job as a whole, and of a change to it: CEL for the API server, and why.

`daruma run` has no API server: `TrainingJobSpec.problems` says the same, with these sentences.
"""

from daruma_operator.api.model import rule

NAME_PATTERN = "^[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?$"
"""Of a job: pods' names and labels are made of it, which may be no longer than 63 characters."""
NAME_FORM = (
    "is no DNS label: write at most 52 lower-case letters, digits and dashes, with no dash at "
    "either end"
)
OF_THE_OBJECT = (
    rule(f"self.metadata.name.matches('{NAME_PATTERN}')", f"metadata.name {NAME_FORM}"),
)

IMMUTABLE = "is immutable: make another TrainingJob instead"

STORE_FORM = (
    "spec.checkpoint.store must be s3://bucket/folder, gs://bucket/folder, az://container/folder "
    "or file:///path, without . or .. in it; credentials do not belong in it: put them into a "
    "Secret that spec.checkpoint.secretRef names"
)

_USES_SAVES = (
    "(!has(self.recovery) || !((has(self.recovery.strategy) && "
    "self.recovery.strategy in ['Partial', 'FullCheckpoint']) || "
    "(has(self.recovery.fallback) && self.recovery.fallback.exists(f, "
    "f in ['Partial', 'FullCheckpoint']))))"
)
_CHAINED = "self.recovery.strategy == 'Chain'"
NEEDS_STORE = (
    "recovery by Partial or FullCheckpoint needs spec.checkpoint.store: name one, or choose "
    "Stateless or Freshest"
)
NEEDS_EVERY = (
    "recovery by Partial or FullCheckpoint needs periodic saves: set spec.checkpoint.every to 1 "
    "or more"
)
NEEDS_CLAIM = (
    "a file:// store needs spec.checkpoint.claimName: the PersistentVolumeClaim that the servers "
    "share"
)
NO_CLAIM = (
    "spec.checkpoint.claimName belongs to a file:// store: remove it, or write store: file:///path"
)
NO_REF = (
    "spec.checkpoint.secretRef belongs to an s3://, gs:// or az:// store: remove it, or name such "
    "a store"
)
TOO_OFTEN = "spec.checkpoint.every × fraction must be at least 1: save less often or more at once"
TOO_FEW_SERVERS = (
    "spec.recovery.chain.replicas and copies live in the pods of different servers: they may not "
    "be more than spec.servers.replicas"
)
NO_COPIES = (
    "spec.recovery.copies goes together with Freshest or Stateless: Chain's replicas have "
    "everything, and Partial and FullCheckpoint go back to what was saved, whatever was covered"
)
EVERY_NEEDS_NONE = "spec.recovery.chain.every above 1 needs ack: None"
TOO_MANY = (
    "spec.workers.minReplicas must be at most spec.workers.replicas: the job could never begin"
)
NOT_BOUNDED = (
    "spec.consistency.maxStaleness belongs to mode Bounded: remove it, or write mode: Bounded"
)
NO_CHAIN = (
    "spec.recovery.fallback lists Chain, but only strategy: Chain, or copies above 1, keeps "
    "replicas"
)
NO_ANY = (
    "spec.recovery.chain.pulls: Any needs every: 1, and consistency Async or Sync: choose those, "
    "or pulls: Head"
)
NO_TWICE = "spec.recovery.fallback lists a strategy twice, or the strategy itself"

OF_A_JOB = (
    rule(
        _USES_SAVES + " || (has(self.checkpoint) && has(self.checkpoint.store))",
        NEEDS_STORE,
    ),
    rule(
        _USES_SAVES + " || !has(self.checkpoint) || !has(self.checkpoint.every) || "
        "self.checkpoint.every > 0",
        NEEDS_EVERY,
    ),
    rule(
        "!has(self.checkpoint) || !has(self.checkpoint.store) || "
        "!self.checkpoint.store.startsWith('file://') || has(self.checkpoint.claimName)",
        NEEDS_CLAIM,
    ),
    rule(
        "!has(self.checkpoint) || !has(self.checkpoint.store) || "
        "self.checkpoint.store.startsWith('file://') || !has(self.checkpoint.claimName)",
        NO_CLAIM,
    ),
    rule(
        "!has(self.checkpoint) || !has(self.checkpoint.secretRef) || "
        "(has(self.checkpoint.store) && !self.checkpoint.store.startsWith('file://'))",
        NO_REF,
    ),
    rule(
        "!has(self.checkpoint) || self.checkpoint.every == 0 || "
        "double(self.checkpoint.every) * double(self.checkpoint.fraction) >= 1.0",
        TOO_OFTEN,
    ),
    rule(
        "!has(self.recovery) || !has(self.recovery.fallback) || "
        "self.recovery.fallback.all(f, f != self.recovery.strategy && "
        "self.recovery.fallback.filter(g, g == f).size() == 1)",
        NO_TWICE,
    ),
    rule(
        "!has(self.recovery) || (self.recovery.copies <= self.servers.replicas && "
        f"(!({_CHAINED}) || self.recovery.chain.replicas <= self.servers.replicas))",
        TOO_FEW_SERVERS,
    ),
    rule(
        "!has(self.recovery) || self.recovery.copies == 1 || "
        "self.recovery.strategy in ['Freshest', 'Stateless']",
        NO_COPIES,
    ),
    rule(
        "!has(self.recovery) || self.recovery.chain.every == 1 || "
        "self.recovery.chain.ack == 'None'",
        EVERY_NEEDS_NONE,
    ),
    rule(
        "!has(self.recovery) || !has(self.recovery.fallback) || "
        "self.recovery.copies > 1 || self.recovery.fallback.all(f, f != 'Chain')",
        NO_CHAIN,
    ),
    rule(
        "!has(self.recovery) || self.recovery.chain.pulls == 'Head' || "
        "(self.recovery.chain.every == 1 && self.consistency.mode != 'Bounded')",
        NO_ANY,
    ),
    rule("self.workers.minReplicas <= self.workers.replicas", TOO_MANY),
    rule(
        "self.consistency.mode == 'Bounded' || self.consistency.maxStaleness == 0",
        NOT_BOUNDED,
    ),
)
OF_A_CHANGE = (
    rule("self.program == oldSelf.program", f"spec.program {IMMUTABLE}"),
    rule(
        "self.servers.replicas == oldSelf.servers.replicas",
        f"spec.servers.replicas {IMMUTABLE}",
    ),
    rule(
        "self.workers.replicas == oldSelf.workers.replicas",
        f"spec.workers.replicas {IMMUTABLE} (elastic workers come later)",
    ),
    rule(
        "self.workers.minReplicas == oldSelf.workers.minReplicas",
        f"spec.workers.minReplicas {IMMUTABLE}",
    ),
    rule("self.consistency == oldSelf.consistency", f"spec.consistency {IMMUTABLE}"),
    rule(
        "has(self.checkpoint.store) == has(oldSelf.checkpoint.store) && "
        "(!has(self.checkpoint.store) || "
        "self.checkpoint.store == oldSelf.checkpoint.store)",
        f"spec.checkpoint.store {IMMUTABLE}",
    ),
    rule(
        "has(self.checkpoint.claimName) == has(oldSelf.checkpoint.claimName) && "
        "(!has(self.checkpoint.claimName) || "
        "self.checkpoint.claimName == oldSelf.checkpoint.claimName)",
        f"spec.checkpoint.claimName {IMMUTABLE}",
    ),
    rule(
        "has(self.checkpoint.secretRef) == has(oldSelf.checkpoint.secretRef) && "
        "(!has(self.checkpoint.secretRef) || "
        "self.checkpoint.secretRef == oldSelf.checkpoint.secretRef)",
        f"spec.checkpoint.secretRef {IMMUTABLE}, or change what the Secret holds",
    ),
    rule(
        "has(self.blockBytes) == has(oldSelf.blockBytes) && "
        "(!has(self.blockBytes) || self.blockBytes == oldSelf.blockBytes)",
        f"spec.blockBytes {IMMUTABLE}",
    ),
)
