"""What front and engine say to each other, over one inherited socketpair.

Each message is a frozen dataclass, packed by `pagedd_daemon.link` as a msgpack array whose first
element names the class. Both ends are ours and of one version, so there is no schema negotiation;
the engine trusts the front's validation, and the front checks only the tag of what comes back.

``rid`` is the front's number of a request, unique for the life of the front. ``index`` counts the
samples of a request (n > 1) from 0. Token ids are packed little-endian int32.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# ------------------------------------------------------------------------------- front to engine


@dataclass(frozen=True, slots=True)
class Configure:
    """First message: what to load. Answered by `Loading`…, then `Ready` or `Failed`."""

    backend: str
    """``torch``, ``llama.cpp`` or ``simulated``; ``auto``: torch if there is a CUDA device that can
    compute the model, else llama.cpp."""
    model_path: str
    """Validated GGUF file, or folder in Hugging Face's layout; ``""`` for a simulated model."""
    model_digest: bytes
    context_tokens: int
    """0: what the model was trained with."""
    kv_tokens: int
    """Tokens of the first tier; 0: chosen from the memory of the machine."""
    ram_bytes: int
    """Budget of the RAM tier."""
    threads: int
    """CPU threads that compute where there is no GPU; 0: the number of physical cores."""
    ram_fd: int = -1
    """The memory file that the engine has inherited for it (`pagedd_daemon.memory_file`); -1: none,
    and the tier is gone with the engine."""
    disk_bytes: int = 0
    """Budget of the disk tier; 0: there is none."""
    disk_folder: str = ""
    """Where its file lies."""
    disk_persist: bool = False
    """Whether it outlives the engine (`pagedd_daemon.engine.tiers.store`)."""
    disk_eras: list[tuple[int, int]] = field(default_factory=list)
    """Users who have cleared what they had there, and their era: pages of earlier ones are erased
    when it is opened (`pagedd_daemon.owners`)."""
    vram_bytes: int = 0
    """torch only: device memory that the engine may take, weights included; 0: what there is."""
    write_through: bool = True
    """Keep full blocks of live sequences in the RAM tier too, where the next engine finds them."""
    kv_dtype: str = "f16"
    """llama.cpp only; torch keeps KV in the type it computes in."""
    flash_attention: bool = True
    """llama.cpp only."""
    vocab_size: int = 0
    """Tokens the tokeniser knows (llama.cpp reads its own)."""
    eog_tokens: tuple[int, ...] = ()
    """Ids that end a generation, as the tokeniser says (llama.cpp reads its own)."""
    piece_lengths: bytes = b""
    """Bytes of each token by id, packed int32, 0 for special tokens; empty without a tokeniser."""
    pieces: bytes = b""
    """The bytes of all tokens, one after the other: grammars are compiled against them."""
    simulated_step_us: int = 1000
    """Simulated backend only: fixed part of a step's time, in microseconds."""
    simulated_token_us: int = 0
    """Simulated backend only: further time per input token of a step."""


@dataclass(frozen=True, slots=True)
class App:
    """Who an app is and what holds for it: before its first `Submit` while it has none live, and
    again when its settings change. The engine forgets it with its last request."""

    key: str
    """What `Submit` and the figures call it."""
    uid: int
    scope: str
    """Control group or executable of its process; ``""`` if unknown."""
    name: str
    weight: float
    max_running: int
    """Requests that run at the same time; 0 for any number."""
    kv_floor_tokens: int
    kv_ceiling_tokens: int
    """Of the first tier, for its namespace; 0 for none."""
    root: bytes
    """Its namespace's salt, as in `Submit`."""
    owner: int
    """Whose pages its requests leave, as in `Submit`."""


@dataclass(frozen=True, slots=True)
class Submit:
    """A request, valid in every respect the front can check."""

    rid: int
    app: str
    """`App.key`."""
    klass: int
    """`kvpager.types.PriorityClass`."""
    root: bytes
    """Namespace salt, 32 bytes: the engine mixes in the model digest and the KV dtype."""
    prompt: bytes
    """What was asked and then what was ``generated``, token ids."""
    n: int
    sampling: dict[str, Any]
    """Fields of `pagedd_daemon.params.SamplingParams`."""
    stop: dict[str, Any]
    """Fields of `pagedd_daemon.params.StopParams`."""
    grammar_kind: str = ""
    """One of `pagedd_daemon.grammars.KINDS`, or empty: the output is free."""
    grammar: str = ""
    """What it has to match; the helper has compiled it on trial."""
    beams: dict[str, Any] = field(default_factory=dict)
    """Fields of `pagedd_daemon.params.BeamParams`: the ``n`` best texts of a search. Empty: ``n``
    samples."""
    generated: int = 0
    """Trailing tokens of the prompt that an engine before this one has drawn and reported: the
    sample goes on behind them as if it had never stopped. Only where ``n`` is 1."""
    index: int = 0
    """Of the sample, where ``n`` is 1: each that goes on is a request of its own."""
    prompt_logprobs: int = -1
    """-1: none. k >= 0: the log-probability of each token of the prompt but the first, and the k
    most likely ones (`PromptScores`). Then all of it is computed, whatever is cached."""
    owner: int = 0
    """Whose pages it leaves (`pagedd_daemon.owners`)."""
    hold: bool = False
    """When it has ended and was not cancelled, its KV stays in a lower tier until `Drop`."""


@dataclass(frozen=True, slots=True)
class Embed:
    """Texts to turn into vectors. Answered by `Embedded` in a `StepReport`."""

    rid: int
    """Below 0, unlike those of `Submit`."""
    app: str
    """`App.key`."""
    klass: int
    """`kvpager.types.PriorityClass`."""
    inputs: list[bytes]
    """Token ids of each text, at least one."""
    normalize: bool
    """Vectors shall have length 1."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """End every sample of the request now. Answered by `Closed` in the next `StepReport`, unless it
    is an `Embed`."""

    rid: int


@dataclass(frozen=True, slots=True)
class Finish:
    """The front found a stop string: sample ``index`` ends with its first ``tokens`` tokens.

    Later ones, already computed or not, are forgotten: truncated from KV and not counted.
    """

    rid: int
    index: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Pause:
    """The client does not read: keep the request out of steps until `Unpause`."""

    rid: int


@dataclass(frozen=True, slots=True)
class Unpause:
    """The client reads again."""

    rid: int


@dataclass(frozen=True, slots=True)
class Drop:
    """What the request ``rid`` has left behind, or would, is held no longer (`Submit.hold`)."""

    rid: int


@dataclass(frozen=True, slots=True)
class AskSnapshot:
    """Asks for a `Snapshot` before the next step."""

    blocks: bool = False
    """With the block map."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Give everything back and exit 0. The front has ended every request before."""


# ------------------------------------------------------------------------------- engine to front


@dataclass(frozen=True, slots=True)
class Loading:
    """The model is being loaded."""

    fraction: float


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine serves."""

    backend: str
    device: str
    vocab_size: int
    context_tokens: int
    """The longest sequence (prompt and reply) it serves: the model's context or the pool, whichever
    is smaller."""
    pool_tokens: int
    block_tokens: int
    eog_tokens: tuple[int, ...]
    kv_dtype: str
    ram_tokens: int = 0
    """Of the RAM tier."""
    notice: str = ""
    """What people must be told of how it computes."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The model could not be loaded; the engine exits."""

    code: str
    message: str
    details: dict[str, Any]


@dataclass(slots=True)
class Output:
    """New tokens of one sample. Not frozen: that would treble the time to make one, and both ends
    make one per token."""

    rid: int
    index: int
    tokens: bytes
    logprobs: list[tuple[float, list[tuple[int, float]]]] | None = None
    """One entry per token, if asked for."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A sample is over. Its last `Output` precedes this in the same report or came before.

    The token that ended it (end of generation, stop id) is in no `Output` and not counted.
    """

    rid: int
    index: int
    reason: str
    """``stop``, ``length``, ``context`` or ``cancelled``."""
    score: float | None = None
    """Of a text that a beam search has found."""


@dataclass(frozen=True, slots=True)
class Closed:
    """All samples of a request are over and its KV is cached or gone. Nothing follows for it."""

    rid: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    """By this engine; `Submit.generated` are not among them."""
    queue_ms: float
    prompt_ms: float
    generation_ms: float
    ttft_ms: float


@dataclass(frozen=True, slots=True)
class Rejected:
    """The request ends with an error. Nothing follows for it."""

    rid: int
    code: str
    message: str
    details: dict[str, Any]


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of some tokens of a prompt, in order; never the same one twice."""

    rid: int
    start: int
    """Position of the first of them, at least 1."""
    logprobs: list[tuple[float, list[tuple[int, float]]]]
    """As in `Output`, one entry per token."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """An `Embed` is over."""

    rid: int
    dimensions: int
    vectors: bytes
    """Little-endian float32, one vector for each text."""
    code: str = ""
    """Empty, or why there are none."""
    message: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class StepReport:
    """Everything of one step, in one message. Filled while the step's results are gone through."""

    steps: int
    """Steps retired since start: the progress counter that health is read from."""
    outputs: list[Output] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)
    closed: list[Closed] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    started: list[tuple[int, int]] = field(default_factory=list)
    """``(rid, cached tokens)`` of requests whose prompt began to be computed in this step."""
    prompts: list[PromptScores] = field(default_factory=list)
    embedded: list[Embedded] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine's figures: `pagedd_daemon.engine.snapshot` documents the keys."""

    figures: dict[str, Any]


ToEngine = (
    Configure
    | App
    | Submit
    | Embed
    | Cancel
    | Finish
    | Pause
    | Unpause
    | Drop
    | AskSnapshot
    | Shutdown
)
ToFront = Loading | Ready | Failed | StepReport | Snapshot
