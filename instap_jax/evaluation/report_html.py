"""The page of a report: elements that escape their text by construction, and the one style sheet.

No scripts, no external files. Colours are CSS variables, so that tables and inline plots follow the
reader's light or dark setting, and print in the light one.
"""

import html

SERIES = 6  # distinct run colours; further runs repeat them (plots: with dashed lines)


DOCTYPE = "<!doctype html>"
_VOID = {"img", "meta"}


class Html(str):
    """Text that is markup already and is not escaped again."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Html:
    """An element. Children that are plain `str` are escaped; `class_` stands for `class`."""
    written = "".join(
        f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items()
    )
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: str) -> Html:
    """Children one after the other, plain strings escaped."""
    return Html("".join(c if isinstance(c, Html) else html.escape(str(c)) for c in children))


def table(header: list[str], rows: list[list[str]], *, label: str, class_: str = "") -> Html:
    """A table whose first column heads its rows; wide ones scroll sideways in their own box.

    Args:
      label: what it shows, for readers who reach its box by key or by ear.
    """
    head = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in header)))
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    inside = tag("table", head, tag("tbody", *body), class_=class_)
    box = {"class_": "wide", "tabindex": "0", "role": "region", "aria-label": label}
    return tag("div", inside, **box)


def note(*children: str) -> Html:
    return tag("p", *children, class_="note")


def swatch(slot: int) -> Html:
    """The colour mark of run number `slot`."""
    return Html(f'<i class="swatch" style="background:var(--s{slot % SERIES})"></i>')


def page(title: str, *body: str) -> Html:
    """A complete HTML document."""
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    return join(
        Html(f"{DOCTYPE}\n"),
        tag("html", tag("head", head), tag("body", tag("main", *body)), lang="en"),
        Html("\n"),
    )


_LIGHT = """--paper:#fdfdfc;--card:#fff;--ink:#17191e;--muted:#5d6470;--line:#e2e4e8;
--soft:#f4f5f6;--s0:#2563c9;--s1:#d45f17;--s2:#0d8a6c;--s3:#b5367f;--s4:#7450c6;--s5:#8a6d00;
color-scheme:light"""
_DARK = """--paper:#131519;--card:#191c21;--ink:#e7e9ec;--muted:#9ba2ad;--line:#2d3138;
--soft:#20242a;--s0:#6ea2f7;--s1:#f0915a;--s2:#3fc3a2;--s3:#e57db6;--s4:#ab8ff0;--s5:#d0ad3b;
color-scheme:dark"""

STYLE = (
    f":root{{{_LIGHT}}}\n"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}\n"
    """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);
  font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif}
main{max-width:1400px;margin:0 auto;padding:40px 28px 72px}
h1{font-size:27px;line-height:1.2;margin:0 0 4px;letter-spacing:-.015em}
h2{font-size:19px;margin:46px 0 10px;padding-top:14px;border-top:2px solid var(--ink);
  letter-spacing:-.005em}
h3{font-size:15px;margin:26px 0 2px}
p{margin:6px 0 10px;max-width:100ch}
.lead,.note,.protocol{color:var(--muted)}
.note,.protocol{font-size:13px}
.protocol{margin:0 0 8px;max-width:none}
.legend{display:flex;flex-wrap:wrap;gap:6px 22px;margin:16px 0 0;padding:0;list-style:none}
.legend.small{margin:4px 0 8px;font-size:13px}
.swatch{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:7px;
  vertical-align:-1px}
.wide{overflow-x:auto;margin:6px 0 14px}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums;min-width:50%}
th,td{padding:5px 14px 5px 0;text-align:right;white-space:nowrap;vertical-align:top;
  border-bottom:1px solid var(--line)}
th:first-child{text-align:left}
thead th{font-weight:600;color:var(--muted);border-bottom:1px solid var(--ink);font-size:12.5px}
tbody th{font-weight:500}
tr:hover>*{background:var(--soft)}
table.facts td,table.facts thead th,table.diff td,table.diff thead th{text-align:left}
table.diff td{font-family:ui-monospace,"Liberation Mono",monospace;font-size:12.5px;
  white-space:normal;overflow-wrap:anywhere}
table.diff th{font-family:ui-monospace,"Liberation Mono",monospace;font-size:12.5px}
table.facts td{white-space:normal;min-width:150px}
.pm{color:var(--muted);font-size:11.5px}
td .pm{display:inline-block;min-width:2.7em;margin-left:.4em;text-align:left}
td .pm.range{min-width:5.6em}
td b{font-weight:700}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,460px),1fr));gap:14px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;
  padding:12px 12px 6px;break-inside:avoid}
figcaption{font-size:13px;font-weight:600;margin:0 2px 4px}
figcaption span{font-weight:400;color:var(--muted)}
figure svg{display:block;width:100%;height:auto}
figure svg *{stroke-linejoin:round}
figure svg text{font-family:inherit!important}
figure.sheet img{display:block;max-width:100%;max-height:440px;margin:0 auto 6px;border-radius:4px}
.sheets{display:grid;gap:16px}
.sheets figcaption,.cards figcaption{font-weight:400}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr));gap:14px;
  margin:8px 0 14px}
.overlays{display:flex;flex-wrap:wrap;gap:6px 16px;font-size:13px;align-items:end}
.strip{margin:2px 0 8px}
.strip img{display:block;max-width:100%;border-radius:4px}
.strip p{font-size:12.5px;margin:3px 0 0;color:var(--muted)}
.strip p b{color:var(--ink);font-weight:600}
.key{width:150px;height:11px;vertical-align:-1px;border-radius:3px}
.remark{display:block}
.named{margin-right:12px}
table.scored th,table.scored td{padding-right:10px}
table.scored td:nth-child(2),table.scored th:nth-child(2){text-align:left}
details{margin:8px 0;border:1px solid var(--line);border-radius:8px;padding:8px 14px;
  background:var(--card)}
details[open]>summary{margin-bottom:10px}
summary{cursor:pointer;font-weight:600;font-size:14px}
pre{font:12px/1.5 ui-monospace,"Liberation Mono",monospace;overflow-x:auto;max-height:480px}
footer{margin-top:52px;padding-top:12px;border-top:1px solid var(--line);color:var(--muted);
  font-size:12.5px}
@media print{main{max-width:none;padding:0}h2,h3{break-after:avoid}tr{break-inside:avoid}
  .panels{grid-template-columns:1fr 1fr}.wide{overflow:visible}body{font-size:12px}
  table{font-size:8.5px;width:100%}thead th,table.diff td,table.diff th{font-size:8px}
  .pm{font-size:7.5px}td .pm{min-width:2.3em;margin-left:.2em}td .pm.range{min-width:0}
  th,td,table.scored th,table.scored td{white-space:normal;padding:3px 5px 3px 0}
  pre{max-height:none;white-space:pre-wrap}}
"""
)
