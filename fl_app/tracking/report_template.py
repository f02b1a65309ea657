"""The page of a report, as a jinja2 template with autoescape.

A Python file, because Flower's app bundle carries no template files.
"""

from __future__ import annotations

PAGE = """\
{%- macro plot(chart) %}
<figure class="card"><h3>{{ chart.title }}</h3>
{%- if chart.legend %}
<ul class="legend">
{%- for label, color in chart.legend %}
<li><span style="background: {{ color }}"></span>{{ label }}</li>
{%- endfor %}
</ul>
{%- endif %}
{{ chart.svg|safe }}
<figcaption>{{ chart.caption }}</figcaption></figure>
{%- endmacro -%}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root {
  color-scheme: light dark;
  --page: #f7f8fa; --card: #ffffff; --text: #1b1f27; --ink: #565e6b; --rule: #d5d9e0;
  --blue: #2a62c9; --orange: #c2571a; --green: #16806a; --purple: #8b4fb3; --red: #c03548;
  --sky: #1fa3c4; --olive: #a08a1c; --pink: #d264a4; --brown: #8a5a3c; --indigo: #3d4a9c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151b; --card: #1a1e26; --text: #e8eaee; --ink: #a3abb8; --rule: #363c48;
    --blue: #7aa7ff; --orange: #f0995c; --green: #55c4aa; --purple: #c596e8; --red: #f08090;
    --sky: #5cc8e4; --olive: #cdb950; --pink: #ee95c8; --brown: #c4936f; --indigo: #8b97ea;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: 30px; line-height: 1.2; font-weight: 650; letter-spacing: -.02em; margin: 0; }
h2 { font-size: 19px; font-weight: 620; letter-spacing: -.01em; margin: 48px 0 16px; }
h3 { font-size: 14px; font-weight: 620; margin: 0 0 10px; }
.kicker, .muted, figcaption, dt, th { color: var(--ink); }
.kicker { font-size: 13px; margin: 0 0 6px; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 28px; margin: 14px 0 0; padding: 0; }
.facts div { display: flex; gap: 8px; }
dl, dd { margin: 0; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: 12.5px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.figures { display: grid; gap: 12px; margin-top: 32px;
  grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); }
.figures .card { padding: 16px 18px; }
.figures dt { font-size: 13px; }
.figures dd { font-size: 24px; font-weight: 620; letter-spacing: -.02em; line-height: 1.35;
  font-variant-numeric: tabular-nums; }
.figures .long dd { font-size: 17px; line-height: 32px; white-space: nowrap; }
.figures small { display: block; font-size: 12.5px; font-weight: 400; letter-spacing: 0;
  line-height: 1.4; white-space: pre-line; color: var(--ink); }
.sections { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(310px, 1fr)); }
.sections .card { padding: 18px 20px; }
table { width: 100%; border-collapse: collapse; font-size: 14px; }
th { text-align: left; font-weight: 400; }
th, td { padding: 6px 0; border-top: 1px solid var(--rule); vertical-align: top; }
tr:first-child > * { border-top: 0; }
td { text-align: right; padding-left: 16px; font-variant-numeric: tabular-nums; }
.plots { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); }
@media (max-width: 480px) { .plots, .sections { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; padding: 18px 20px; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: -4px 0 8px; padding: 0;
  list-style: none; font-size: 13px; color: var(--ink); }
.legend span { display: inline-block; width: 14px; height: 4px; border-radius: 2px;
  margin-right: 7px; vertical-align: middle; }
figcaption { font-size: 13px; line-height: 1.5; margin-top: 10px; }
.scroll { overflow-x: auto; padding: 10px 20px; }
.reasons th, .reasons td { padding-right: 20px; }
.reasons td { text-align: left; padding-left: 0; }
.reasons td:last-child, .reasons th:last-child { text-align: right; padding-right: 0; }
.reasons .reason { overflow-wrap: anywhere; width: 100%; }
details { padding: 14px 20px; }
summary { cursor: pointer; font-weight: 550; }
pre { overflow-x: auto; margin: 14px 0 4px; line-height: 1.6; }
.note { padding: 12px 18px; margin-top: 24px; border-left: 3px solid var(--orange); }
footer { margin-top: 40px; font-size: 13px; color: var(--ink); }
@media print { body { background: none; } .card { break-inside: avoid; } main { padding: 0; } }
</style>
</head>
<body>
<main>
<header>
<p class="kicker">Federated run{% if name %} · {{ name }}{% endif %}</p>
<h1>{{ title }}</h1>
<dl class="facts">
{%- for label, value in facts %}
<div><dt>{{ label }}</dt><dd>{% if label in ("model", "config") -%}
<code title="{{ value }}">{{ value[:12] }}</code>{% else %}{{ value }}{% endif %}</dd></div>
{%- endfor %}
</dl>
</header>
{% for note in notes %}<p class="card note">{{ note }}</p>{% endfor %}
{%- if headline %}
<dl class="figures">
{%- for label, value, small in headline %}
<div class="card{% if value|length > 9 %} long{% endif %}"><dt>{{ label }}</dt>
<dd>{{ value }}{% if small %}<small>{{ small }}</small>{% endif %}</dd></div>
{%- endfor %}
</dl>
{%- endif %}
{%- if sections %}
<section aria-labelledby="result"><h2 id="result">Result</h2>
<div class="sections">
{%- for section in sections %}
<div class="card"><h3>{{ section.title }}</h3>
<table aria-label="{{ section.title }}"><tbody>
{%- for label, value in section.rows %}
<tr><th scope="row">{{ label }}</th><td>{{ value }}</td></tr>
{%- endfor %}
</tbody></table></div>
{%- endfor %}
</div></section>
{%- endif %}
{%- if partition %}
<section aria-labelledby="partition"><h2 id="partition">Who owns what</h2>
<div class="plots">{{ plot(partition) }}
</div></section>
{%- endif %}
{%- if charts %}
<section aria-labelledby="rounds"><h2 id="rounds">Round by round</h2>
<div class="plots">
{%- for chart in charts %}{{ plot(chart) }}{% endfor %}
</div></section>
{%- endif %}
{%- if reasons %}
<section aria-labelledby="reasons"><h2 id="reasons">Why clients failed</h2>
<div class="card scroll"><table class="reasons"><thead>
<tr><th scope="col">kind</th><th scope="col" class="reason">reason</th>
<th scope="col">times</th></tr></thead><tbody>
{%- for kind, reason, count in reasons %}
<tr><td>{{ kind }}</td><td class="reason">{{ reason }}</td><td>{{ count }}</td></tr>
{%- endfor %}
</tbody></table></div></section>
{%- endif %}
{%- if config %}
<section aria-labelledby="config"><h2 id="config">Configuration</h2>
<details class="card"><summary>The resolved config.yaml</summary>
<pre><code>{{ config }}</code></pre></details></section>
{%- endif %}
<footer>Drawn from the files beside this page.</footer>
</main>
</body>
</html>
"""
