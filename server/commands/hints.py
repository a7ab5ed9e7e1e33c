"""What to do about an error: one sentence for each reason that a server gives, and for each status without one."""

from weft.client import WeftError

REASONS: dict[str, str] = {
    "ADAPTER_CORRUPT": "register it again: `weft adapters add NAME FOLDER --replace`",
    "ADAPTER_EXISTS": "add --replace to point the name at these files, or choose another name",
    "ADAPTER_INCOMPATIBLE": "`weft adapters show NAME` says why; register a version made for this backbone",
    "ADAPTER_INVALID": "change what the message names, here or in the files; `weft info` lists the methods served",
    "ADAPTER_MEMORY": "start the server with a larger --adapter-memory-bytes-max",
    "ADAPTER_NOT_FOUND": "`weft adapters list` shows what is registered",
    "ANSWER_TOO_LARGE": "ask for fewer tokens, or for a stream of them",
    "BUG": "look the incident up in the server's log and report it",
    "CREDENTIALS_INVALID": "name a file with the server's token: --token-file FILE",
    "DEADLINE_EXCEEDED": "ask for fewer tokens, or allow more time: --timeout here, --request-duration-s-max there",
    "DIGEST_MISMATCH": "the files changed while they were sent: try again",
    "FOLDER_INVALID": "",
    "INVALID_REQUEST": "change the field that the message names; `weft info` shows the limits",
    "MALFORMED_MESSAGE": "client and server speak different versions: install the same one on both sides",
    "NON_FINITE_LOGITS": "this adapter computes no numbers on this prompt: check how it was trained, or its dtype",
    "PROMPT_TOO_LONG": "shorten the prompt or lower --max-new-tokens; `weft info` shows the context",
    "REQUEST_TOO_LARGE": "shorten the prompt, lower --max-new-tokens, or start the server with more --kv-bytes-max",
    "SERVICE_UNKNOWN": "client and server speak different versions: install the same one on both sides",
    "SLOW_CONSUMER": "read the stream as it comes, or raise the server's --write-stall-s-max",
    "STORE_FULL": "make room on the disk of the server's --store, or `weft adapters rm NAME`",
    "STORE_IO_ERROR": "look the incident up in the server's log and check the disk of its --store",
    "TOKENIZER_MISSING": "send token ids: --tokens 1,2,3",
    "UPLOAD_INVALID": "the files changed while they were sent: try again",
    "UPLOAD_STALLED": "try again; on a slow line raise the server's --upload-idle-s-max",
    "UPLOAD_TOO_LARGE": "start the server with a larger --adapter-bytes-max",
}
RETRY = frozenset({"DRAINING", "ENGINE_MEMORY", "ENGINE_RESTARTING", "OVERLOADED", "UPLOADS_BUSY"})
CODES: dict[str, str] = {
    "UNAVAILABLE": "is a weft server at {address}? `weft serve --model MODEL` starts one, --server names another one, "
    "and a server with TLS wants --tls or --tls-root-file",
    "DEADLINE_EXCEEDED": "is a weft server at {address}? If it is only slow, allow more time: --timeout",
    "UNIMPLEMENTED": "what answers at {address} is no weft server, or one of another version: --server names another",
    "RESOURCE_EXHAUSTED": "the message is larger than the server takes: send less at once",
}


def hint(error: WeftError, address: str) -> str:
    """Return what to do, or nothing where the message says it all."""
    if error.reason in RETRY:
        return "try again" if error.retry_after_s is None else f"try again in {error.retry_after_s:g} s"
    if error.reason:
        return REASONS.get(error.reason, "")
    return CODES.get(error.code, "").format(address=address)
