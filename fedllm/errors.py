"""Every error fedllm raises, each with a stable code and the exit code a shell sees.

::

    class                                exit  code
    FedllmError                           1    failed
    ├── ConfigError                       2    config
    │   ├── DataError                     2    data
    │   ├── MissingExtra                  2    extra-missing
    │   ├── BaseUnsupported               2    base-unsupported
    │   └── RequestInvalid                2    request-invalid
    ├── PolicyRefused                     3    policy-refused
    │   ├── BudgetExhausted               3    budget-exhausted
    │   ├── BaseMismatch                  3    base-mismatch
    │   ├── ThresholdRefused              3    threshold-refused
    │   ├── CohortRefused                 3    cohort-refused
    │   └── RosterMismatch                3    roster-mismatch
    ├── AuthenticationError               4    authentication
    │   └── SignatureInvalid              4    signature-invalid
    ├── NotFound                          5    not-found
    │   └── AnswerUnknown                 5    answer-unknown
    ├── PeerUnavailable                  69    peer-unavailable
    ├── NotReady                         75    not-ready
    │   └── Overloaded                   75    overloaded
    │       └── QuotaExceeded            75    quota-exceeded
    ├── ProtocolError                     1    protocol
    │   ├── DecodeError                   1    decode
    │   ├── VersionUnsupported            1    version-unsupported
    │   ├── KeysInvalid                   1    keys-invalid
    │   ├── LowOrderKey                   1    low-order-key
    │   ├── SharesUnopenable              1    shares-unopenable
    │   ├── SetRefused                    1    set-refused
    │   ├── SignaturesMissing             1    signatures-missing
    │   └── StepMismatch                  1    step-mismatch
    │       ├── RoundReplayed             1    round-replayed
    │       ├── RequestReused             1    request-reused
    │       ├── TwoViews                  1    two-views
    │       ├── PlanChanged               1    plan-changed
    │       └── AlreadyUnmasked           1    already-unmasked
    ├── IntegrityError                    1    integrity
    │   ├── DigestMismatch                1    digest-mismatch
    │   └── LedgerCorrupt                 1    ledger-corrupt
    ├── NonFiniteUpdate                   1    non-finite-update
    ├── AdapterInvalid                    1    adapter-invalid
    ├── RoundAborted                      1    round-aborted
    ├── AliasConflict                     1    alias-conflict
    ├── PortBusy                          1    port-busy
    ├── ProcessDied                       1    process-died
    └── DiskFull                          1    disk-full

A message names the thing, the value found and the value allowed; ``hint`` says what to do next. Neither
ever holds training text, a prompt or a secret. ``docs/errors.md`` lists every code; a test compares them.
"""

from __future__ import annotations

from typing import ClassVar


class FedllmError(Exception):
    """Base of all errors fedllm raises on purpose.

    Parameters
    ----------
    message : str
        What is wrong: the thing, the value found, the value allowed.
    hint : str, optional
        What the reader can do next.
    """

    code: ClassVar[str] = "failed"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(FedllmError):
    """A setting, flag or file given by a person is wrong."""

    code = "config"
    exit_code = 2


class DataError(ConfigError):
    """A data set cannot be used; line numbers are named, text never is."""

    code = "data"


class MissingExtra(ConfigError):
    """An optional part of fedllm is not installed.

    Parameters
    ----------
    extra : str
        The extra to install, e.g. ``client``.
    module : str
        The module that could not be imported.
    """

    code = "extra-missing"

    def __init__(self, extra: str, module: str) -> None:
        super().__init__(
            f"this needs the package {module!r}, which is not installed",
            hint=f"pip install 'fedllm[{extra}]'",
        )
        self.extra = extra
        self.module = module


class BaseUnsupported(ConfigError):
    """A base model folder is not one that fedllm can use."""

    code = "base-unsupported"


class RequestInvalid(ConfigError):
    """An app's request breaks the API's form or a limit that the message names."""

    code = "request-invalid"


class PolicyRefused(FedllmError):
    """A data owner's policy, or the gate, says no."""

    code = "policy-refused"
    exit_code = 3


class BudgetExhausted(PolicyRefused):
    """The projected epsilon passes the owner's limit."""

    code = "budget-exhausted"


class BaseMismatch(PolicyRefused):
    """The base model here is not the one that a plan or an adapter was made for."""

    code = "base-mismatch"


class ThresholdRefused(PolicyRefused):
    """A plan's threshold, graph or least number of survivors protects less than it must."""

    code = "threshold-refused"


class CohortRefused(PolicyRefused):
    """A plan's cohort is smaller than this owner accepts, or does not name it."""

    code = "cohort-refused"


class RosterMismatch(PolicyRefused):
    """A plan speaks of other identities than the roster that is pinned here."""

    code = "roster-mismatch"


class AuthenticationError(FedllmError):
    """Somebody is not who they say they are, or may not do what they ask."""

    code = "authentication"
    exit_code = 4


class SignatureInvalid(AuthenticationError):
    """A signature does not verify against the pinned key."""

    code = "signature-invalid"


class NotFound(FedllmError):
    """A named thing does not exist."""

    code = "not-found"
    exit_code = 5


class AnswerUnknown(NotFound):
    """An answer is rated that this tenant did not get, or got too long ago."""

    code = "answer-unknown"


class PeerUnavailable(FedllmError):
    """The other side of a connection cannot be reached."""

    code = "peer-unavailable"
    exit_code = 69


class NotReady(FedllmError):
    """Not possible yet; the same call may work later."""

    code = "not-ready"
    exit_code = 75


class Overloaded(NotReady):
    """A bounded queue is full.

    Parameters
    ----------
    message : str
        Which limit was met and its value.
    retry_after_s : float
        Seconds after which a retry is sensible.
    """

    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_s = retry_after_s


class QuotaExceeded(Overloaded):
    """A tenant has used up a limit of its own; nobody else is concerned.

    Parameters
    ----------
    message : str
        The limit's name, what was found and what is allowed.
    limit : str
        Name of the limit, as the tenants file has it.
    retry_after_s : float
        Seconds after which the same request would pass, if nothing else is asked until then.
    """

    code = "quota-exceeded"

    def __init__(self, message: str, *, limit: str, retry_after_s: float, hint: str | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s, hint=hint)
        self.limit = limit


class ProtocolError(FedllmError):
    """A peer broke the round protocol."""

    code = "protocol"


class DecodeError(ProtocolError):
    """Bytes are not the canonical encoding of the message expected."""

    code = "decode"


class VersionUnsupported(ProtocolError):
    """A message carries a protocol version that this program does not speak."""

    code = "version-unsupported"


class KeysInvalid(ProtocolError):
    """A list of advertised keys is not what the owners of a cohort advertised."""

    code = "keys-invalid"


class LowOrderKey(ProtocolError):
    """A public key is a point of low order: the secret agreed with it would be known to all (RFC 7748 section 6.1)."""

    code = "low-order-key"


class SharesUnopenable(ProtocolError):
    """Sealed shares do not open: changed on the way, or sealed under another plan or key list.

    Parameters
    ----------
    message : str
    dealers : tuple[str, ...]
        Who dealt them.
    """

    code = "shares-unopenable"

    def __init__(self, message: str, *, dealers: tuple[str, ...] = (), hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.dealers = dealers


class SetRefused(ProtocolError):
    """A set of owners (U1, U2, U3) is too small, not within the one before, or leaves out who is asked."""

    code = "set-refused"


class SignaturesMissing(ProtocolError):
    """Consistency signatures are too few, listed twice, or of owners that are not survivors."""

    code = "signatures-missing"


class StepMismatch(ProtocolError):
    """A message belongs to another step, round or attempt than the one in progress."""

    code = "step-mismatch"


class RoundReplayed(StepMismatch):
    """A round that was accepted here before is begun again."""

    code = "round-replayed"


class RequestReused(StepMismatch):
    """A request came again under its old id with another content."""

    code = "request-reused"


class TwoViews(StepMismatch):
    """A step that is answered once was asked again with something else: another survivor set, list or vector."""

    code = "two-views"


class PlanChanged(StepMismatch):
    """A further attempt at a sum is planned for another update than the one trained here."""

    code = "plan-changed"


class AlreadyUnmasked(StepMismatch):
    """An owner has helped to open a sum with its update, and never masks that update again."""

    code = "already-unmasked"


class IntegrityError(FedllmError):
    """Stored bytes are not what they should be."""

    code = "integrity"


class DigestMismatch(IntegrityError):
    """Content does not hash to its name."""

    code = "digest-mismatch"


class LedgerCorrupt(IntegrityError):
    """The privacy ledger's chain does not verify."""

    code = "ledger-corrupt"


class NonFiniteUpdate(FedllmError):
    """An update holds NaN or infinity and must not be averaged."""

    code = "non-finite-update"


class AdapterInvalid(FedllmError):
    """An adapter's names, shapes, rank or values are not usable."""

    code = "adapter-invalid"


class RoundAborted(FedllmError):
    """A round ended without a version; the reason is in the message and the journal."""

    code = "round-aborted"


class AliasConflict(FedllmError):
    """An alias moved between the caller's read and its compare-and-swap."""

    code = "alias-conflict"


class PortBusy(FedllmError):
    """A listener's address is taken."""

    code = "port-busy"


class ProcessDied(FedllmError):
    """A supervised process ended when it should not have."""

    code = "process-died"


class DiskFull(FedllmError):
    """There is no room for what is about to be written; nothing was left half-written."""

    code = "disk-full"
