"""A report's page taken apart, for its tests."""

import html.parser
import re


class Page(html.parser.HTMLParser):
    """Tags with attributes, and the text, of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_data(self, data):
        self.text += data


def section(page: str, rule: str) -> str:
    return re.search(rf'<section id="{rule}">.*?</section>', page, re.DOTALL).group(0)
