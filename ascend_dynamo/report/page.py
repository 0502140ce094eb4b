"""The frame of the HTML report: one ``string.Template`` with styles and script inline."""

from __future__ import annotations

from string import Template

PAGE = Template(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title - Ascend Dynamo</title>
<style>
:root {
  --paper: light-dark(#ffffff, #16181d); --ink: light-dark(#1c1f26, #d8dce4); --dim: light-dark(#5b6270, #949cab);
  --line: light-dark(#dde1e8, #333844); --head: light-dark(#f3f5f8, #1f232b);
  --del: light-dark(#fde8e8, #3d2024); --add: light-dark(#e2f6e6, #1b3524); --none: light-dark(#f3f5f8, #1b1e24);
  color-scheme: light dark;
}
:root[data-theme="light"] { color-scheme: light; }
:root[data-theme="dark"] { color-scheme: dark; }
body { font: 15px/1.5 system-ui, sans-serif; background: var(--paper); color: var(--ink); margin: 0 auto;
  max-width: 1500px; padding: 1.5rem; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2, h3 { display: inline-block; margin: .8rem 0 .3rem; }
h2 { font-size: 1.15rem; } h3 { font-size: 1rem; }
.note, .meta { color: var(--dim); margin: .2rem 0; }
section { border-top: 1px solid var(--line); margin-top: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .7rem; border-bottom: 1px solid var(--line);
  max-width: 48rem; overflow-wrap: anywhere; }
th { background: var(--head); position: sticky; top: 0; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
table.diff { width: 100%; table-layout: fixed; border: 1px solid var(--line); }
table.diff td, pre { font: 12px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap; }
table.diff td { padding: .05rem .5rem; border-bottom: 0; max-width: none; }
td.del { background: var(--del); } td.add { background: var(--add); } td.none { background: var(--none); }
tr.gap td { background: var(--head); color: var(--dim); text-align: center; }
summary { cursor: pointer; }
button { float: right; font: inherit; color: inherit; background: var(--head); border: 1px solid var(--line);
  border-radius: 4px; padding: .2rem .7rem; cursor: pointer; }
</style>
</head>
<body>
<button type="button" id="theme">light / dark</button>
<h1>$title</h1>
<p>$head</p>
<p class="meta">torch $torch; $options</p>
$body
<script>
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
</script>
</body>
</html>
"""
)
