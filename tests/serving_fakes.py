"""Stand-ins for vLLM: an OpenAI-compatible server that can misbehave, and a program with `vllm serve`'s command line.

Run as a program it plays ``vllm``: the head answers HTTP, a headless node sleeps. Its behaviour is set by files in the
folder FAKE_DIR: ``<node>.pid`` is written by it, ``<flaw>`` existing there switches a flaw on.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODEL = "tiny"
CONTEXT = 64
REASONING, ANSWER = "2 plus 3 equals 5.\n", "\n\nThe answer is 5."
LOGPROB = -1.5


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM does, except for the server's flaws."""

    server: "FakeServer"
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def has(self, flaw: str) -> bool:
        return flaw in self.server.flaws

    def answer(self, value: object, status: int = 200) -> None:
        body = json.dumps(self.server.change(value)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/health":
            busy = self.server.chats > 0
            bad = self.has("health") or (self.has("health_after") and busy)
            self.answer({}, 503 if bad else 200)
        elif self.path == "/v1/models":
            name = "other" if self.has("model_name") else MODEL
            self.answer({"data": [{"id": name, "max_model_len": self.server.context}]})
        else:
            self.answer({}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        if body["model"] != MODEL and not self.has("unknown_model"):
            return self.answer({"error": "no such model"}, 404)
        if self.path == "/v1/completions":
            return self.complete(body)
        text = body["messages"][-1]["content"]
        if len(text.split()) > self.server.context:
            return self.answer({"error": "too long"}, 500 if self.has("over_long_prompt") else 400)
        return self.chat(body, text)

    def complete(self, body: dict) -> None:
        """A completion, with log-probabilities of its prompt where they are asked for."""
        prompt, total = body["prompt"], len(body["prompt"]) + body["max_tokens"]
        if total > self.server.context and not self.has("one_more"):
            return self.answer({"error": "too long"}, 500 if self.has("refused_by_500") else 400)
        if total == self.server.context and self.has("context_limit"):
            return self.answer({"error": "too long"}, 400)
        if self.has("context_cut"):
            total -= 7
        value = {"choices": [{"text": "x"}], "usage": {"total_tokens": total}}
        if "prompt_logprobs" in body:
            shown = prompt[: 2 if self.has("short_logprobs") else None]
            logprob = float("nan") if self.has("nan_logprobs") else LOGPROB
            value["choices"][0]["prompt_logprobs"] = [None, *({str(t): {"logprob": logprob}} for t in shown[1:])]
        return self.answer(value)

    def chat(self, body: dict, text: str) -> None:
        with self.server.lock:
            self.server.chats += 1
            self.server.running += 1
            count, running = self.server.chats, self.server.running
            self.server.most_running = max(self.server.most_running, running)
        try:
            time.sleep(self.server.seconds)
            if self.server.meeting:
                self.server.meeting.wait()
            if self.has("concurrency") and running > 1:
                return self.answer({"error": "overloaded"}, 500)
            if self.has("hangs_when_busy") and running > 3:
                return self.server.stopped.wait(10)
            if self.has("vanish"):
                os._exit(1)
            if self.has("silent"):
                time.sleep(3)
            reasoning, content, finish = REASONING, ANSWER, "stop"
            if self.has("chat") or "endless" in text:
                content, finish = None, "length"
            if self.has("reasoning_separate"):
                reasoning, content = None, REASONING + ANSWER
            if self.has("thinks_when_asked") and not body.get("chat_template_kwargs", {}).get("thinking"):
                reasoning = None
            if self.has("mumbles"):
                content = "the the the " * 30
            if self.has("stream_begins_like_it"):
                content = " ".join(map(str, range(100)))
            if self.has("no_template_tokens"):
                content += "<｜end▁of▁sentence｜>"
            if self.has("finish_reason"):
                finish = "length"
            if self.has("late_leak") and "2 + 4" in text:
                reasoning = f"<think>{reasoning}"
            if self.has("empty_when_busy") and running > 1:
                reasoning = content = ""
            if self.has("repeatable") and not body.get("stream") and count == 2:
                content += " Or 6."
            if body.get("stream"):
                return self.stream(reasoning, content, finish)
            message = {"role": "assistant", "content": content, self.server.reasoning_field: reasoning}
            if body.get("tools") and (self.has("calls") or self.has("tool_calls")):
                called = {"name": body["tools"][0]["function"]["name"], "arguments": '{"a": 2, "b": 3}'}
                message["tool_calls"] = [{"type": "function", "function": called}]
                if self.has("tool_calls"):
                    called["arguments"] = '{"a": 2'
            choice = {"message": message, "finish_reason": finish, "token_ids": [7, 8, 1]}
            if self.has("wrong_end"):
                choice["token_ids"] = [7, 8, 9]
            usage = {"prompt_tokens": 3, "completion_tokens": 12}
            prompt = self.server.render(body["messages"])
            value = {"choices": [choice], "usage": usage, "prompt_token_ids": prompt}
            if self.has("no_token_ids"):
                del value["prompt_token_ids"], choice["token_ids"]
            return self.drip(value) if self.has("drips") else self.answer(value)
        finally:
            with self.server.lock:
                self.server.running -= 1

    def drip(self, value: dict) -> None:
        """An answer whose bytes never end, none of them late."""
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())
        while not self.server.stopped.wait(0.05):
            self.wfile.write(b" ")

    def stream(self, reasoning: str | None, content: str | None, finish: str) -> None:
        if self.has("streaming"):
            content = "Something else."
        if self.has("stream_begins_like_it"):
            content = content[:-20]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        deltas = [{self.server.reasoning_field: reasoning or ""}, {"content": content or ""}]
        if self.has("stream_order"):
            half = len(reasoning) // 2
            field = self.server.reasoning_field
            deltas = [{field: reasoning[:half]}, {"content": content}, {field: reasoning[half:]}]
        pieces = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
        if self.has("stream_drips"):
            while not self.server.stopped.wait(0.02):
                self.wfile.write(b" ")
        if self.has("stream_error"):
            pieces.append({"error": {"message": "EngineCore encountered an issue", "code": 500}})
        if self.has("stream_other_end"):
            finish = "length"
        if not self.has("stream_without_end"):
            pieces.append({"choices": [{"delta": {}, "finish_reason": finish}]})
        pieces.append({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 12}})
        for piece in map(self.server.change, pieces):
            self.wfile.write(f"data: {json.dumps(piece, ensure_ascii=not self.server.raw)}\n\n".encode())
        if not self.has("stream_end"):
            self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True


class FakeServer(ThreadingHTTPServer):
    """The server; ``flaws`` are names of checks it fails."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, address: tuple[str, int], flaws: set[str], reasoning_field: str = "reasoning", context: int = CONTEXT
    ):
        super().__init__(address, Handler)
        self.context = context
        self.render = lambda messages: [0, 5, 6]  # token ids of a prompt
        self.seconds = 0.02  # of one answer
        self.stopped = threading.Event()
        self.flaws = flaws
        self.raw = False  # streams texts as UTF-8, as vLLM does, instead of JSON's escapes
        self.change = lambda value: value  # of an answer, or of a streamed piece, before it is sent
        self.reasoning_field = reasoning_field
        self.requests: list[dict] = []
        self.lock = threading.Lock()
        self.chats = self.running = self.most_running = 0
        self.meeting: threading.Barrier | None = None  # answers wait until as many requests are there


@contextlib.contextmanager
def fake_server(*flaws: str, reasoning_field: str = "reasoning") -> Iterator[FakeServer]:
    """A running fake server on a free loopback port."""
    server = FakeServer(("127.0.0.1", 0), set(flaws), reasoning_field)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()


def write_model(folder: Path) -> None:
    """A folder that passes for a model: config, two files of weights with their index, tokenizer, chat template."""
    folder.mkdir(parents=True)
    special = ["<s>", "</s>", "<think>", "</think>", "a", "b", "c"]
    weights = {}
    for number in (1, 2):
        name = f"tensor{number}"
        header = json.dumps({name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        file = folder / f"model-{number}.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        weights[name] = file.name
    contents = {
        "config.json": {"vocab_size": len(special), "eos_token_id": 1, "max_position_embeddings": CONTEXT},
        "model.safetensors.index.json": {"weight_map": weights},
        "tokenizer.json": {"added_tokens": [{"id": i, "content": word} for i, word in enumerate(special)]},
        "tokenizer_config.json": {"eos_token": "</s>", "chat_template": "{{ messages }}"},
    }
    for name, value in contents.items():
        (folder / name).write_text(json.dumps(value))


def play_vllm(arguments: list[str]) -> None:
    """Be ``vllm serve`` on one node."""
    folder, node = Path(os.environ["FAKE_DIR"]), os.environ["SLURMD_NODENAME"]
    flaws = {path.name for path in folder.iterdir()}
    print(f"fake vllm on {node}: {' '.join(arguments)}", flush=True)
    if "bad-flag" in flaws:
        print("vllm: error: unrecognized arguments: --bad-flag", flush=True)
        sys.exit(2)
    if "ray-lost-a-worker" in flaws and "--headless" not in arguments:
        while not (folder / "n1.pid").exists():  # it has said something by then
            time.sleep(0.05)
        place = "\tclass_name: RayWorkerProc\n\tpid: 339\n\tname: vllm_PP1\n\tip: 127.0.0.1"
        print(f"ray.exceptions.ActorDiedError: The actor died unexpectedly.\n{place}", flush=True)
        sys.exit(1)
    if "eats-memory" in flaws and "--headless" in arguments:
        block = b"x" * (800 << 20)
        print(f"took {len(block)} bytes", flush=True)
    if "stubborn" in flaws:  # ignores TERM, and has a child in a session of its own that does too
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        code = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        (folder / f"{node}.grandchild").write_text(str(child.pid))
    if "worker" in flaws:  # has a process with a title as vLLM's workers have, and does not care what becomes of it
        worker = subprocess.Popen(["VLLM::Worker_TP0", "600"], executable="/bin/sleep")
        (folder / f"{node}.worker").write_text(str(worker.pid))
    (folder / f"{node}.folder").write_text(os.environ["TMPDIR"])
    (folder / f"{node}.pid").write_text(str(os.getpid()))
    if "--headless" in arguments or "never-ready" in flaws:
        print("Loading safetensors checkpoint shards:  40% Completed | 4/10", flush=True)
        time.sleep(600)
    host, port = (arguments[arguments.index(f"--{name}") + 1] for name in ("host", "port"))
    context = int(arguments[arguments.index("--max-model-len") + 1])
    FakeServer((host, int(port)), flaws, context=context).serve_forever()


if __name__ == "__main__":
    play_vllm(sys.argv[1:])
