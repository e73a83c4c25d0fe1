"""The helper process: parses what others wrote (model vocabularies, chat templates, prompts).

It is started by `pagedd_daemon.front.helper_pool`, holds no secret, has no network and no right to
gain any privilege, and is killed and replaced when it takes too long. See `protocol` for what
is said over its socket.
"""
