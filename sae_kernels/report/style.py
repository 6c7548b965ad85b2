"""The page's frame and style sheet. Nothing in it is loaded from anywhere else."""

from string import Template

CSS = """
:root { color-scheme: light dark;
  --page: #faf9f7; --card: #ffffff; --ink: #1f2328; --muted: #59606a; --rule: #d9dde2;
  --blue: #0072b2; --orange: #bf5000; --heat: 255 168 48; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171b; --card: #1b1f25; --ink: #e6e8eb; --muted: #a3abb5; --rule: #343a43;
  --blue: #5bb5f0; --orange: #ffa04d; --heat: 172 88 0; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main, body > header { max-width: 70rem; margin: 0 auto; padding: 0 clamp(1rem, 4vw, 2.5rem); }
body > header { padding-top: clamp(1.5rem, 5vw, 3.5rem); }
main { padding-bottom: 4rem; }
h1 { font-size: clamp(1.6rem, 5vw, 2.4rem); line-height: 1.15; letter-spacing: -.02em;
  margin: 0 0 .4rem; text-wrap: balance; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 3rem 0 .4rem; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 0 0 1rem; max-width: 46rem; }
a { color: var(--blue); }
.subtitle { font-size: 1.1rem; color: var(--muted); }
.muted { color: var(--muted); }
:focus-visible { outline: 2px solid var(--blue); outline-offset: 1px; }

.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1rem; margin: 1.75rem 0 0; }
.tiles > div, figure, .latent { background: var(--card); border: 1px solid var(--rule);
  border-radius: .6rem; }
.tiles > div { padding: 1rem 1.15rem; display: flex; flex-direction: column; }
.tiles dt { color: var(--muted); font-size: .875rem; }
.tiles dd { margin: 0; }
.tiles .big { font-size: clamp(1.5rem, 3.2vw, 2.1rem); font-weight: 650; line-height: 1.25;
  letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.tiles .note { color: var(--muted); font-size: .875rem; line-height: 1.4; }

.figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1rem; }
figure { margin: 0; padding: 1rem 1rem .9rem; }
figure svg { display: block; width: 100%; height: auto; stroke-linejoin: round; }
figure svg text { font-family: inherit !important; }
figcaption { color: var(--muted); font-size: .875rem; line-height: 1.45; margin-top: .5rem; }

.chips { list-style: none; padding: 0; margin: 0 0 1.25rem; display: flex; flex-wrap: wrap;
  gap: .4rem; }
.chips a { display: block; padding: .15rem .65rem; border: 1px solid var(--rule);
  border-radius: 1rem; background: var(--card); text-decoration: none; font-size: .875rem;
  font-variant-numeric: tabular-nums; }
.chips a:hover { border-color: var(--blue); }
.chips span { color: var(--muted); unicode-bidi: isolate; }
.latent { margin: 0 0 1rem; padding: .9rem 1.15rem; scroll-margin-top: 1rem; }
.latent header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 .9rem;
  margin-bottom: .4rem; font-size: .9375rem; }
.latent header p { margin: 0; overflow-wrap: anywhere; }
.latent header .muted { margin-left: auto; font-size: .875rem; }
.contexts { list-style: none; margin: 0; padding: 0; font-size: .9375rem; }
.contexts li { display: flex; align-items: baseline; gap: .75rem; padding: .1rem 0;
  border-top: 1px solid var(--rule); cursor: pointer; }
.value { flex: none; width: 2.9rem; text-align: right; color: var(--muted); font-size: .8125rem;
  font-variant-numeric: tabular-nums; }
.line { flex: 1; min-width: 0; display: flex; align-items: baseline; white-space: pre; }
.left, .right { flex: 1 1 0; min-width: 0; overflow: hidden; padding: .15rem 0; }
.left { flex: none; width: 45%; display: flex; justify-content: flex-end;
  -webkit-mask-image: linear-gradient(to right, transparent, #000 1.5rem);
  mask-image: linear-gradient(to right, transparent, #000 1.5rem); }
.left > span { flex: none; }
.right { -webkit-mask-image: linear-gradient(to left, transparent, #000 1.5rem);
  mask-image: linear-gradient(to left, transparent, #000 1.5rem); }
.line [style] { background: rgb(var(--heat) / var(--a)); border-radius: .2rem; padding: .1em 0;
  unicode-bidi: isolate; color: inherit; }
.line mark { font-weight: 700; box-shadow: inset 0 -2px 0 var(--orange); padding: .1em .12em;
  max-width: 60%; overflow: hidden; text-overflow: ellipsis; }
li:focus .line { display: block; white-space: pre-wrap; overflow-wrap: anywhere; }
li:focus :is(.left, .right) { display: inline; -webkit-mask: none; mask: none; }

.tables { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 2.5rem; }
table { width: 100%; border-collapse: collapse; font-size: .9375rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem 0; font-weight: 400;
  border-top: 1px solid var(--rule); }
th { color: var(--muted); padding-right: 1rem; }
th small { display: block; line-height: 1.35; }
td { text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: .6rem;
  padding: .9rem 1.15rem; margin: .4rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .875rem/1.5 ui-monospace, Menlo, monospace; }

@media (max-width: 46rem) {
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .6rem; }
  .tiles > div, .latent { padding: .75rem .8rem; }
  .figures, .tables { grid-template-columns: minmax(0, 1fr); }
  .latent header .muted { margin-left: 0; }
  .contexts li { gap: .5rem; }
  .value { width: 2.3rem; }
  .left { width: 38%; }
  figure { padding: .75rem .6rem; }
}
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
@media print { .latent, figure { break-inside: avoid; } .chips { display: none; } }
"""

# The policy makes the browser itself hold the page to being self-contained and script-free.
PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$title</title>
<style>$css</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="subtitle">$subtitle</p>
</header>
<main>
$body
</main>
</body>
</html>
""")
