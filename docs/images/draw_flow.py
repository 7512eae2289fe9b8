"""Draw the flow of the stages for the README: flow.svg and flow.zh.svg beside this file, or into the folder given.

The files are committed; a test checks that they are these. They follow the reader's light or dark setting.

    python docs/images/draw_flow.py [FOLDER]
"""

import sys
from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 870, 350
BOX_HEIGHT = 46

STYLE = """
  svg { --ink: #1f2328; --faint: #59636e; --line: #818b98; --stage: #ddf4ff; --edge: #0969da; --file: #f6f8fa; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #f0f6fc; --faint: #9198a1; --line: #656c76; --stage: #10243e; --edge: #4493f8; --file: #151b23; }
  }
  text { font-family: ui-sans-serif, system-ui, "Noto Sans CJK SC", sans-serif; fill: var(--ink); text-anchor: middle; }
  .label { font-size: 14px; }
  .name { font: 600 14px ui-monospace, "DejaVu Sans Mono", monospace; }
  .note { font-size: 12px; fill: var(--faint); }
  .stage { fill: var(--stage); stroke: var(--edge); }
  .file { fill: var(--file); stroke: var(--line); }
  .arrow { fill: none; stroke: var(--line); stroke-width: 1.5; marker-end: url(#tip); }
  #tip path { fill: var(--line); }
"""

WORDS = {
    "en": {
        "title": "From raw chats and a base model to a served, tested model",
        "settings": "config + profile",
        "chats": "raw chats",
        "base": "base model",
        "fits": "does it fit?",
        "counted": "with counted tokens",
        "text": "train.jsonl, rejects.jsonl",
        "tokens": "tokens, labels",
        "bf16": "BF16",
        "first": "first: preflight of the nodes",
        "checkpoint": "checkpoint",
        "safetensors": "safetensors",
        "equal": "= checkpoint, ≈ base",
        "vllm": "vLLM on the nodes, API",
        "page": "one page",
        "receipt": "every stage ends with results/<experiment>/receipts/<rule>.json; the next one starts from it",
    },
    "zh": {
        "title": "从原始对话和基座模型到可服务、已测试的模型",
        "settings": "配置 + profile",
        "chats": "原始对话",
        "base": "基座模型",
        "fits": "放得下吗？",
        "counted": "按实际 token 数",
        "text": "train.jsonl, rejects.jsonl",
        "tokens": "token、标签",
        "bf16": "BF16",
        "first": "第一步：节点检查 preflight",
        "checkpoint": "检查点",
        "safetensors": "safetensors",
        "equal": "= 检查点，≈ 基座",
        "vllm": "多节点 vLLM，API",
        "page": "一页报告",
        "receipt": "每个阶段以 results/<实验>/receipts/<规则>.json 结束，下一阶段从它开始",
    },
}


def box(x: int, y: int, width: int, name: str, note: str = "", kind: str = "stage") -> str:
    """A stage (its rule's name and what it makes) or, with kind ``file``, something given."""
    middle, line = x + width // 2, y + (20 if note else 28)
    name_class = "name" if kind == "stage" else "label"
    parts = [f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{BOX_HEIGHT}" rx="6"/>']
    parts.append(f'<text class="{name_class}" x="{middle}" y="{line}">{escape(name)}</text>')
    if note:
        parts.append(f'<text class="note" x="{middle}" y="{y + 37}">{escape(note)}</text>')
    return "\n".join(parts)


def arrow(path: str) -> str:
    return f'<path class="arrow" d="{path}"/>'


def draw(words: dict[str, str]) -> str:
    """The picture as SVG text."""
    parts = [
        box(20, 20, 130, words["settings"], kind="file"),
        box(190, 20, 150, "plan", words["fits"]),
        box(390, 20, 170, "refine_plan", words["counted"]),
        box(20, 100, 130, words["chats"], kind="file"),
        box(190, 100, 170, "prepare_data", words["text"]),
        box(390, 100, 170, "tokenize_data", words["tokens"]),
        box(20, 180, 130, words["base"], kind="file"),
        box(190, 180, 170, "prepare_model", words["bf16"]),
        box(630, 100, 220, "train", words["first"]),
        box(20, 270, 180, "convert_checkpoint", words["safetensors"]),
        box(236, 270, 176, "verify_model", words["equal"]),
        box(448, 270, 186, "smoke_test", words["vllm"]),
        box(670, 270, 180, "build_report", words["page"]),
        arrow("M150 43 H186"),
        arrow("M150 123 H186"),
        arrow("M360 123 H386"),
        arrow("M475 100 V70"),
        arrow("M560 43 H700 V96"),
        arrow("M560 123 H626"),
        arrow("M150 203 H186"),
        arrow("M360 203 H680 V150"),
        arrow("M780 146 V236 H110 V266"),
        f'<text class="note" x="440" y="230">{escape(words["checkpoint"])}</text>',
        arrow("M200 293 H232"),
        arrow("M412 293 H444"),
        arrow("M634 293 H666"),
        f'<text class="note" x="{WIDTH // 2}" y="340">{escape(words["receipt"])}</text>',
    ]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(words["title"])}">\n<title>{escape(words["title"])}</title>\n<style>{STYLE}</style>\n'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z"/></marker></defs>\n{body}\n</svg>\n'
    )


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    (folder / "flow.svg").write_text(draw(WORDS["en"]), encoding="utf-8")
    (folder / "flow.zh.svg").write_text(draw(WORDS["zh"]), encoding="utf-8")


if __name__ == "__main__":
    main()
