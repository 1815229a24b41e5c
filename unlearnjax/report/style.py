"""The page's style sheet: one column of text, tables that scroll on a phone, light, dark and print."""

STYLE = """
:root {
  color-scheme: light dark;
  --bg: #ffffff; --fg: #1a1f26; --muted: #59636e; --rule: #e1e5ea; --soft: #f5f7f9; --accent: #0a5fb4;
  --warn: #8a4b00; --warn-bg: #fff6e5;
  --base: #59636e; --gold: #8a6d00; --candidate: #0a5fb4; --merge: #b83c00;
  --c0: #0a5fb4; --c1: #b83c00; --c2: #00755a; --c3: #9a2f83; --c4: #7d6200;
  --c5: #5a4fcf; --c6: #b3192e; --c7: #4a5560;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #14171b; --fg: #e7eaee; --muted: #9aa5b1; --rule: #2c333b; --soft: #1b2026; --accent: #6cb6ff;
    --warn: #ffc66d; --warn-bg: #2b2314;
    --base: #a7b1bc; --gold: #e6c34a; --candidate: #6cb6ff; --merge: #ff9a5c;
    --c0: #6cb6ff; --c1: #ff9a5c; --c2: #3fcfa5; --c3: #ee8fd5; --c4: #e6c34a;
    --c5: #a9a1ff; --c6: #ff8b94; --c7: #b4bdc7;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--bg); color: var(--fg);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif;
}
main { max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.75rem 0 .6rem; letter-spacing: -.01em; }
p { margin: .5rem 0; max-width: 46rem; }
.muted, .note, figcaption { color: var(--muted); }
.note, figcaption { font-size: .875rem; max-width: 46rem; }
.lead { font-size: 1.1rem; margin: 1.1rem 0 1.4rem; }
.num { font-variant-numeric: tabular-nums; }
code, pre {
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .85em;
}
code { overflow-wrap: anywhere; }
pre {
  background: var(--soft); padding: .9rem 1rem; border-radius: 8px; overflow-x: auto; line-height: 1.5;
  margin: .5rem 0;
}
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .9rem; margin: 1.25rem 0; }
.card {
  background: var(--soft); border-radius: 10px; border-top: 3px solid var(--rule); padding: .8rem 1rem .9rem;
  min-width: 0;
}
.card.base { border-color: var(--base); } .card.gold { border-color: var(--gold); }
.card.candidate { border-color: var(--candidate); } .card.merge { border-color: var(--merge); }
.card .what { font-size: .8rem; color: var(--muted); }
.card .who { font-weight: 600; overflow-wrap: anywhere; line-height: 1.3; }
.card .big { font-size: 2rem; line-height: 1.15; font-weight: 650; letter-spacing: -.02em; margin: .45rem 0 .1rem; }
.card .big.none { font-size: 1.1rem; color: var(--muted); font-weight: 400; line-height: 2.1rem; letter-spacing: 0; }
.card dl {
  display: grid; grid-template-columns: 1fr auto; gap: .1rem .75rem; margin: .55rem 0 0; font-size: .875rem;
}
.card dt { color: var(--muted); } .card dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.warnings {
  background: var(--warn-bg); border-left: 3px solid var(--warn); border-radius: 0 8px 8px 0;
  padding: .7rem 1rem; margin: 1.25rem 0;
}
.warnings strong {
  color: var(--warn); } .warnings ul { margin: .2rem 0 0; padding-left: 1.2rem; overflow-wrap: anywhere;
}
.scroll { overflow-x: auto; margin: .75rem 0 .5rem; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.35; min-width: 100%; }
th, td { padding: .42rem .5rem; text-align: left; vertical-align: baseline; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; vertical-align: bottom; }
thead th { border-bottom: 1.5px solid var(--muted); color: var(--muted); font-size: .8rem; min-width: 3.6rem; }
thead tr:not(:last-child) th { border-bottom: 0; padding-bottom: 0; }
th.r, td.r { text-align: right; font-variant-numeric: tabular-nums; }
td.r { white-space: nowrap; }
th.task { text-align: center; }
th.group { text-align: center; border-left: 1px solid var(--rule); }
td.first, th.first { border-left: 1px solid var(--rule); }
tbody th {
  vertical-align: baseline;
  font-weight: 500; min-width: 8rem; max-width: 18rem; overflow-wrap: anywhere; position: sticky; left: 0;
  background: var(--bg);
}
tbody th.model { padding-left: 1.75rem; text-indent: -1.15rem; }
tbody th svg { width: .8em; height: .8em; margin-right: .45em; vertical-align: -.03em; }
td .sub { display: block; color: var(--muted); font-size: .75rem; }
td.none { color: var(--muted); font-size: .75rem; }
td.best { font-weight: 700; }
.panels {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.1rem 1.5rem;
  margin: 1rem 0;
}
figure { margin: 0; min-width: 0; }
figure svg { width: 100%; height: auto; display: block; overflow: visible; }
figure.scatter { max-width: 38rem; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .875rem; color: var(--muted); margin: .5rem 0; }
.key svg { width: .85em; height: .85em; margin-right: .4em; vertical-align: -.05em; }
svg text { font-size: 12px; fill: var(--fg); font-family: inherit; }
svg .tick { fill: var(--muted); font-size: 11px; font-variant-numeric: tabular-nums; }
svg .name { fill: var(--muted); }
svg .heading { font-size: 13.5px; font-weight: 600; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--muted); stroke-width: 1; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg .raw { fill: none; stroke-width: 1; opacity: .22; }
svg .leader { fill: none; stroke: var(--muted); stroke-width: .8; opacity: .55; }
svg .ideal { fill: none; stroke: var(--muted); stroke-width: 1.5; }
svg .mark { stroke: var(--bg); stroke-width: 1.5; }
svg .mark.base { fill: var(--base); } svg .mark.gold { fill: var(--gold); }
svg .mark.candidate { fill: var(--candidate); } svg .mark.merge { fill: var(--merge); }
svg .s0 { stroke: var(--c0); } svg .f0 { fill: var(--c0); }
svg .s1 { stroke: var(--c1); } svg .f1 { fill: var(--c1); }
svg .s2 { stroke: var(--c2); } svg .f2 { fill: var(--c2); }
svg .s3 { stroke: var(--c3); } svg .f3 { fill: var(--c3); }
svg .s4 { stroke: var(--c4); } svg .f4 { fill: var(--c4); }
svg .s5 { stroke: var(--c5); } svg .f5 { fill: var(--c5); }
svg .s6 { stroke: var(--c6); } svg .f6 { fill: var(--c6); }
svg .s7 { stroke: var(--c7); } svg .f7 { fill: var(--c7); }
svg .label { paint-order: stroke; stroke: var(--bg); stroke-width: 3px; stroke-linejoin: round; }
svg .label.merge, svg .label.base, svg .label.gold { font-weight: 600; }
footer { margin-top: 3rem; border-top: 1px solid var(--rule); padding-top: .8rem; }
@media (max-width: 40rem) {
  main { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  .lead { font-size: 1rem; }
  th, td { padding: .4rem .5rem; }
  tbody th { max-width: 9.5rem; min-width: 7rem; }
  .panels { grid-template-columns: 1fr; }
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .7rem; }
  .card { padding: .6rem .75rem .7rem; }
  .card .big { font-size: 1.6rem; }
  .card dl { font-size: .78rem; gap: .1rem .4rem; }
}
@media print {
  :root {
    color-scheme: light;
    --bg: #ffffff; --fg: #000000; --muted: #444444; --rule: #cccccc; --soft: #ffffff; --accent: #0a5fb4;
    --warn: #8a4b00; --warn-bg: #ffffff;
    --base: #59636e; --gold: #8a6d00; --candidate: #0a5fb4; --merge: #b83c00;
    --c0: #0a5fb4; --c1: #b83c00; --c2: #00755a; --c3: #9a2f83; --c4: #7d6200;
    --c5: #5a4fcf; --c6: #b3192e; --c7: #4a5560;
  }
  @page { size: A4; margin: 14mm; }
  html { font-size: 12px; }
  body { font-size: 10pt; }
  .lead { font-size: 11.5pt; }
  .note, figcaption { font-size: 8.5pt; }
  p, .note, figcaption { max-width: none; }
  .cards { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  .card dl { font-size: 8pt; }
  main { padding: 0; max-width: none; }
  h2 { break-after: avoid; margin-top: 1.6rem; }
  figure, .card, tr, .warnings, .scroll, .key { break-inside: avoid; }
  .key { break-after: avoid; }
  .card { border: 1px solid var(--rule); border-top-width: 3px; }
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: .2rem .28rem; }
  thead th { font-size: 7pt; min-width: 0; }
  tbody th.model { padding-left: 1.3rem; text-indent: -1.1rem; }
  tbody th { position: static; min-width: 6rem; max-width: 11rem; overflow-wrap: break-word; }
  td .sub, td.none { font-size: 6.5pt; }
  pre { white-space: pre-wrap; border: 1px solid var(--rule); }
  .panels { grid-template-columns: 1fr 1fr; gap: .8rem; }
  figure.scatter { max-width: 130mm; }
}
""".strip()
