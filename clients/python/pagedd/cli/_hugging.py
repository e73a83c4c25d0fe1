"""Models on Hugging Face: which files make one, with their sizes and SHA-256, and its licence.

The hub's library says what there is; the bytes come by `pagedd.cli._download`, like all others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pagedd.cli import _output as out
from pagedd.cli._app import (
    EX_NOINPUT,
    EX_NOPERM,
    EX_TEMPFAIL,
    EX_UNAVAILABLE,
    EX_USAGE,
    CommandError,
)
from pagedd.cli._download import Remote

_NAME = re.compile(
    r"(?:hf\.co/|hf://|https://(?:huggingface\.co|hf\.co)/)?"
    r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<quant>[\w.-]+))?/?"
)
_FOLDER = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|chat_template)\.json"
    r"|chat_template\.jinja|tokenizer\.model|LICENSE.*|model.*\.safetensors(\.index\.json)?"
)
"""Files of a model folder. Never ``.bin`` and the like, which hold pickles."""
_USUAL = ("Q4_K_M", "Q4_K_S", "Q4_0", "Q8_0")
"""Quantisations to take where none was named, the first that there is."""


@dataclass(frozen=True, slots=True)
class Found:
    """A model of the hub."""

    name: str
    """File or folder name to give it."""
    files: tuple[tuple[str, Remote], ...]
    """Paths and where they come from; one alone for a GGUF file."""
    folder: bool
    license: str
    page: str


def is_name(model: str) -> bool:
    """Whether it is written like a model of the hub."""
    return _NAME.fullmatch(model) is not None


def find(model: str) -> Found:
    """Ask the hub for a model: ``user/repo`` or ``hf.co/user/repo:Q4_K_M``.

    Raises:
        CommandError: There is none, it may not be read, the hub cannot be reached, or its library
            is not installed.
    """
    match = _NAME.fullmatch(model)
    assert match is not None
    repo, quant = match["repo"], match["quant"]
    info, headers, url = _ask(repo)
    license_ = _license(info)
    page = f"https://huggingface.co/{repo}"
    siblings = {s.rfilename: s for s in info.siblings or ()}

    def remote(name: str) -> Remote:
        sibling = siblings[name]
        lfs = sibling.lfs
        sha = None if lfs is None else lfs.sha256
        return Remote(url(name), sibling.size, sha, headers)

    files = [name for name in siblings if name.endswith(".gguf") and "/" not in name]
    if files:
        chosen = choose(files, quant, repo)
        return Found(chosen, ((chosen, remote(chosen)),), False, license_, page)
    if quant is not None:
        raise CommandError(
            f"{repo} has no GGUF files, so no {quant}",
            code="E_MODEL",
            exit_code=EX_USAGE,
            advice=f"Leave ':{quant}' out, or see {page}.",
        )
    parts = sorted(name for name in siblings if _FOLDER.fullmatch(name))
    if "config.json" not in parts or not any(name.endswith(".safetensors") for name in parts):
        raise CommandError(
            f"{repo} has neither GGUF files nor config.json with safetensors",
            code="E_MODEL",
            exit_code=EX_NOINPUT,
            advice=f"See {page}; often somebody has a GGUF version.",
        )
    named = tuple((name, remote(name)) for name in parts)
    return Found(repo.partition("/")[2], named, True, license_, page)


def choose(files: Sequence[str], quant: str | None, repo: str) -> str:
    """The GGUF file that is meant.

    Raises:
        CommandError: None is, or several are.
    """
    whole = [name for name in files if not re.search(r"-\d{5}-of-\d{5}\.gguf$", name)]
    wanted = (quant,) if quant is not None else _USUAL
    for name in wanted:
        pattern = re.compile(rf"(^|[^A-Za-z0-9]){re.escape(name)}([^A-Za-z0-9_]|$)", re.IGNORECASE)
        found = [file for file in whole if pattern.search(file)]
        if len(found) == 1:
            return found[0]
    if quant is None and len(whole) == 1:
        return whole[0]
    which = f"no single file for {quant}" if quant else "several files"
    raise CommandError(
        f"{repo} has {which}: {', '.join(sorted(whole) or sorted(files))}",
        code="E_MODEL",
        exit_code=EX_USAGE,
        advice=f"Name one by its quantisation: hf.co/{repo}:Q4_K_M",
    )


def _ask(repo: str) -> tuple[Any, dict[str, str], Any]:
    """What the hub says of a repository, the headers to send, and the address of its files."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ModuleNotFoundError:
        raise CommandError(
            "models of Hugging Face need the Python package 'huggingface_hub', which is not "
            "installed",
            code="E_NOT_INSTALLED",
            exit_code=EX_UNAVAILABLE,
            advice="Install it with: pip install 'pagedd[cpu]', or give pull the URL of a file.",
        ) from None
    try:
        info = huggingface_hub.HfApi().model_info(repo, files_metadata=True, timeout=30.0)
    except errors.GatedRepoError as error:
        raise _denied(repo) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CommandError(
            f"Hugging Face has no model {repo}, or not for you",
            code="E_NOT_FOUND",
            exit_code=EX_NOINPUT,
            advice="Check the name; for a private one, set HF_TOKEN.",
        ) from error
    except Exception as error:
        raise CommandError(
            f"Hugging Face cannot be reached ({str(error).splitlines()[0][:200] or type(error)})",
            code="E_NETWORK",
            exit_code=EX_TEMPFAIL,
            advice="Check the network, then try again; a model file that you have serves by its "
            "path.",
        ) from error

    def url(name: str) -> str:
        return str(huggingface_hub.hf_hub_url(repo, name, revision=info.sha))

    token = huggingface_hub.get_token()
    return info, {"Authorization": f"Bearer {token}"} if token else {}, url


def _denied(repo: str) -> CommandError:
    return CommandError(
        f"{repo} is for those who have accepted its licence",
        code="E_DENIED",
        exit_code=EX_NOPERM,
        advice=f"Accept it on https://huggingface.co/{repo}, and set HF_TOKEN.",
    )


def _license(info: Any) -> str:
    card = getattr(info, "card_data", None)
    said = (card.get("license_name") or card.get("license")) if card else None
    if isinstance(said, list):
        said = ", ".join(map(str, said))
    return out.printable(str(said)) if said else "not stated"
