"use strict";
// The page of report/browser.py: reads its one compressed stream, then shows what is asked for. Text of
// strangers reaches the page by textContent alone.
const page = (id) => document.getElementById(id);
const make = (tag, text, into) => {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (into) into.append(made);
  return made;
};
const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };
const SHOWN = 100; // rows of the list at once; scrolling to its end shows as many more

let data; // the arrays by name, and the header's words, scales and radius
let n; // latents
let matches = []; // latents in the order of the list
let chosen = -1; // the latent that is shown

async function read() {
  const packed = Uint8Array.from(atob(page("data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = await new Response(stream).arrayBuffer();
  const end = new Uint8Array(bytes).indexOf(10);
  const header = JSON.parse(new TextDecoder().decode(bytes.slice(0, end)));
  data = { words: header.words, scales: header.scales, radius: header.radius };
  let start = end + 1;
  for (const { name, dtype, shape } of header.arrays) {
    const size = shape.reduce((a, b) => a * b, 1) * Number(dtype[1]);
    data[name] = new ARRAYS[dtype](bytes.slice(start, start + size));
    start += size;
  }
  n = data.counts.length;
}

const row = (array, latent) => {
  const width = array.length / n;
  return array.subarray(latent * width, (latent + 1) * width);
};
const number = (x) => String(Number(x.toPrecision(3)));
const percent = (x) => `${number(100 * x)} %`;
const density = (latent) => data.counts[latent] / data.stream.length;
// A latent's strongest tokens; a peak is a row + 1, and 0 is none.
const peakWords = (latent) => [...row(data.peaks, latent)].filter(Boolean).map((p) => data.words[data.stream[p - 1]]);
const favourite = (latent) => [...new Set(peakWords(latent).map((word) => word.trim()))].slice(0, 3).join(" ");

const ORDERS = {
  often: (a, b) => data.counts[b] - data.counts[a] || a - b,
  // Those that never fire come last.
  rare: (a, b) => (data.counts[a] || Infinity) - (data.counts[b] || Infinity) || a - b,
  strong: (a, b) => data.high[b] - data.high[a] || a - b,
  number: (a, b) => a - b,
};

// Latents that peak on a word with `query` in it, or promote one; a number is that latent first.
function search(query) {
  const all = [...Array(n).keys()];
  const wanted = query.trim().toLowerCase();
  if (!wanted) return all;
  const hit = Uint8Array.from(data.words, (word) => word.toLowerCase().includes(wanted));
  const found = all.filter(
    (latent) =>
      row(data.peaks, latent).some((p) => p && hit[data.stream[p - 1]]) ||
      (data.promoted && row(data.promoted, latent).some((word) => hit[word])),
  );
  const itself = /^\d+$/.test(wanted) && Number(wanted) < n ? Number(wanted) : -1;
  return itself < 0 ? found : [itself, ...found.filter((latent) => latent !== itself)];
}

function update() {
  const query = page("query").value;
  matches = search(query);
  const first = /^\d+$/.test(query.trim()) ? matches.splice(0, 1) : [];
  matches.sort(ORDERS[page("order").value]).unshift(...first);
  page("found").textContent = `${matches.length.toLocaleString("en")} of ${n.toLocaleString("en")} latents`;
  page("list").replaceChildren();
  page("list").scrollTop = 0;
  extend();
  show(matches.length ? matches[0] : -1);
}

function extend() {
  const list = page("list");
  for (const latent of matches.slice(list.children.length, list.children.length + SHOWN)) {
    const item = make("li", undefined, list);
    item.dataset.latent = latent;
    item.setAttribute("role", "option");
    make("b", latent, item);
    make("span", favourite(latent), item);
    make("small", percent(density(latent)), item);
  }
}

function show(latent) {
  chosen = latent;
  for (const item of page("list").children) {
    const selected = Number(item.dataset.latent) === latent;
    item.setAttribute("aria-selected", selected);
    if (selected) item.scrollIntoView({ block: "nearest" });
  }
  const into = page("shown");
  into.replaceChildren();
  if (latent < 0) return;
  make("h2", `Latent ${latent}`, into);
  const fires = data.counts[latent]
    ? `fires on ${percent(density(latent))} of tokens, max activation ${number(data.high[latent])}`
    : "fired on no token of the sample";
  make("p", fires, into).className = "muted";
  if (data.counts[latent]) {
    histogram(latent, into);
    make("h3", "Strongest in", into);
    const lines = make("ol", undefined, into);
    lines.className = "contexts";
    row(data.peaks, latent).forEach((peak, i) => peak && context(latent, peak - 1, i, lines));
  }
  if (data.promoted) {
    const pair = make("div", undefined, into);
    pair.className = "pair";
    effects(latent, "promoted", "Promotes", pair);
    effects(latent, "suppressed", "Suppresses", pair);
  }
  neighbours(latent, into);
}

function histogram(latent, into) {
  make("h3", "Activations", into);
  const bars = make("div", undefined, into);
  bars.className = "bars";
  bars.setAttribute("role", "img");
  bars.setAttribute("aria-label", "Histogram of activations, on a logarithmic scale");
  for (const height of row(data.histogram, latent)) make("i", undefined, bars).style.height = `${height / 2.55}%`;
  const ends = make("div", undefined, into);
  ends.className = "ends";
  make("span", number(data.low[latent]), ends);
  make("span", "tokens, log scale", ends);
  make("span", number(data.high[latent]), ends);
}

// The document's rows around a peak: the last document that begins at it or before, to the next one.
function context(latent, peak, i, into) {
  let low = 0, high = data.documents.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (data.documents[middle] <= peak) low = middle; else high = middle;
  }
  const first = Math.max(data.documents[low], peak - data.radius);
  const last = Math.min(high < data.documents.length ? data.documents[high] : data.stream.length, peak + data.radius + 1);
  const width = 2 * data.radius + 1;
  const around = row(data.activations, latent).subarray(i * width, (i + 1) * width);
  const item = make("li", undefined, into);
  item.tabIndex = 0;
  const strongest = around[data.radius] / 255;
  const value = make("span", number(strongest * data.high[latent]), item);
  value.className = "value";
  const line = make("span", undefined, item);
  line.className = "line";
  const left = make("span", undefined, line);
  left.className = "left";
  const inner = make("span", undefined, left);
  let into_ = inner;
  for (let at = first; at < last; at++) {
    const word = data.words[data.stream[at]];
    const bare = word.trimStart(), gap = word.slice(0, word.length - bare.length);
    const strength = around[at - peak + data.radius] / 255;
    if (at === peak) {
      inner.append(gap);
      into_ = make("span", undefined, line);
      into_.className = "right";
    } else into_.append(gap);
    const token = make(at === peak ? "mark" : "span", bare || word);
    if (strength) {
      token.style.setProperty("--a", strength.toFixed(2));
      token.style.background = "rgb(var(--heat) / var(--a))";
      token.title = `activation ${number(strength * data.high[latent])}`;
    }
    if (at === peak) line.insertBefore(token, into_); else into_.append(token);
  }
}

function effects(latent, name, title, into) {
  const part = make("div", undefined, into);
  make("h3", title, part);
  const chips = make("ul", undefined, part);
  chips.className = "chips";
  row(data[name], latent).forEach((word, i) => {
    const by = (row(data[`${name}_by`], latent)[i] / 255) * data.scales[name];
    make("li", data.words[word], chips).title = `logit ${name === "promoted" ? "+" : "-"}${number(by)}`;
  });
}

function neighbours(latent, into) {
  const found = [...row(data.neighbours, latent)].map((one, i) => [one - 1, row(data.together, latent)[i]]);
  const near = found.filter(([one]) => one >= 0);
  if (!near.length) return;
  make("h3", "Fires together with", into);
  const chips = make("ul", undefined, into);
  chips.className = "chips";
  for (const [one, share] of near) {
    const button = make("button", `${one} ${favourite(one)}`, make("li", undefined, chips));
    button.type = "button";
    button.title = `cosine of the tokens on which both fire ${number(share / 255)}`;
    button.addEventListener("click", () => show(one));
  }
}

function step(by) {
  const at = Math.min(Math.max(matches.indexOf(chosen) + by, 0), matches.length - 1);
  while (at >= page("list").children.length) extend();
  show(matches.length ? matches[at] : -1);
}

page("query").addEventListener("input", () => data && update());
page("order").addEventListener("change", () => data && update());
document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
page("list").addEventListener("click", (event) => {
  const item = event.target.closest("li");
  if (item) show(Number(item.dataset.latent));
});
page("list").addEventListener("scroll", ({ target }) => {
  if (data && target.scrollTop + target.clientHeight > target.scrollHeight - 200) extend();
});
document.addEventListener("keydown", (event) => {
  if (!data || event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target === page("query");
  if (event.key === "Escape") {
    page("query").value = "";
    page("query").blur();
    update();
  } else if (event.key === "ArrowDown" || (event.key === "j" && !typing)) step(1);
  else if (event.key === "ArrowUp" || (event.key === "k" && !typing)) step(-1);
  else if (event.key === "/" && !typing) page("query").focus();
  else return;
  event.preventDefault();
});
read().then(update, (error) => (page("found").textContent = `The latents cannot be read: ${error.message}`));
