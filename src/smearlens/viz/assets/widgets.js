// Draws each <div class="smearlens"> from the JSON inside it, in place of its picture: maps
// with a grid of heads, strips of tokens, coloured or under bars. Left to Python: checks, limits,
// statistics, escaping.
(() => {
"use strict";
const CSS = `.smearlens{font:13px/1.5 system-ui;
canvas,small,sl-say{display:block}
small{font:10.5px/17px system-ui;opacity:.75}
button{font:11px/14px system-ui;color:inherit;background:none;border:0;padding:2px;border-radius:3px;cursor:pointer;text-align:left}
sl-row,sl-grid{display:flex;flex-wrap:wrap;gap:4px 18px}
b{margin-right:auto}
input{width:140px;vertical-align:middle}
i{display:inline-block;width:90px;height:9px;margin:0 6px}
sl-grid{gap:6px;margin:4px 0}
sl-say,sl-text{white-space:pre-wrap;overflow-wrap:anywhere;min-height:24px}
sl-text{flex:1 1 180px;font:12.5px/1.7 ui-monospace,monospace;max-height:420px;overflow:auto}
span{unicode-bidi:isolate}
.on{box-shadow:inset 0 0 0 1.5px}}`;
const MARKS = ["#f76707", "#12a67c"], { abs, min, max, floor, ceil, round } = Math;
const el = (tag, props, ...kids) => {
	const node = Object.assign(document.createElement(tag), props);
	node.append(...kids);
	return node;
};

// base64 of deflated integers -> value at a flat index
async function decode({ data, bits, low, step }) {
	const packed = new Blob([Uint8Array.from(atob(data), (c) => c.charCodeAt())]);
	const raw = await new Response(packed.stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
	const levels = new (bits > 8 ? Uint16Array : Uint8Array)(raw);
	return (i) => low + step * levels[i];
}

// sizes a canvas in CSS pixels, sharp on any screen
function sized(c, width, height, ink) {
	const dpr = devicePixelRatio, g = c.getContext("2d");
	c.width = round(width * dpr);
	c.height = round(height * dpr);
	c.style.width = width + "px";
	g.scale(dpr, dpr);
	return Object.assign(g, { imageSmoothingEnabled: false, textAlign: "right", textBaseline: "middle", fillStyle: ink, strokeStyle: ink });
}

// 256 colours from low to high; dark where the text around is light
function colours(v) {
	const { low, high, colors } = v.p, g = el("canvas", { width: 256 }).getContext("2d", { willReadFrequently: true });
	g.fillStyle = v.ink = getComputedStyle(v.div).color;
	g.fillRect(0, 0, 1, 1);
	const stops = colors[g.getImageData(0, 0, 1, 1).data[1] >> 7], ramp = g.createLinearGradient(0, 0, 256, 0);
	for (const [place, c] of stops) ramp.addColorStop(place, c);
	g.fillStyle = ramp;
	g.fillRect(0, 0, 256, 1);
	const lut = g.getImageData(0, 0, 256, 1).data;
	v.color = (x) => {
		const j = 4 * round(255 * (x - low) / (high - low));
		return lut.subarray(j, j + 3);
	};
	v.bar.style.background = `linear-gradient(90deg,${stops.map(([place, c]) => c + " " + 100 * place + "%")})`;
}

// tokens as text, coloured or under a bar with its interval and null
function strip(v, tokens, { word, keys, bars, wide }, pick, value, on) {
	const { low, high, interval, band, future } = v.p, spans = tokens.map((t, i) => el("span", { onpointerenter: () => pick(i) }, t));
	const box = el("sl-text", { tabIndex: 0 }, el("small", {}, word), ...spans), y = (x) => bars * (high - x) / (high - low);
	const layer = (c, width, a, b) => `linear-gradient(${c},${c}) 50% ${y(max(a, b))}px/${width} ${max(1, abs(y(a) - y(b)))}px no-repeat`;
	box.fill = () => spans.forEach((span, i) => {
		const x = value(i), c = v.color(x);
		span.className = on(i) ? "on" : "";
		if (bars) span.style = `display:inline-block;text-align:center;min-width:${wide}px;padding:${bars + 3}px 4px 0;background:` + [
			...interval ? [layer("currentColor", "2px", ...interval[v.frame][i])] : [],
			layer(i < future ? MARKS[0] : "#4a8fd6", "80%", 0, x), layer("currentColor", "100%", 0, 0),
			...band ? [layer("#8884", "100%", ...band[i])] : []];
		else if (keys) span.style = `background:rgb(${c});color:${c[1] > 140 ? "#111" : "#fff"}`;
	});
	return box;
}

function view(v) {
	const { p, at, body } = v, [, H, Q, K] = p.shape, { rows, cols = rows } = p;
	let head = 0, q = Q - 1, k = p.cell ? -1 : 0, locked = [], shown, images, cw, ch;
	const value = (h, q, k) => at(((v.frame * H + h) * Q + q) * K + k);
	const move = (a, b) => update(q = max(0, min(Q - 1, a)), k = max(-1, min(K - 1, b)));
	body.onkeydown = (e) => {
		const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Escape: [0, 0] }[e.key];
		if (!step) return;
		e.preventDefault();
		if (e.key > "B") locked = [];
		move(q + step[0], k + step[1]);
	};

	// a pixel per cell, or the strongest cell under it: thin stripes survive
	const image = (h, size) => images[[h, size]] ??= (() => {
		const w = min(K, size), t = min(Q, size), best = new Float32Array(w * t).fill(NaN);
		for (let q = 0; q < Q; q++) for (let k = p.causal ? q : K - 1; k >= 0; k--) {
			const j = floor(q * t / Q) * w + floor(k * w / K), x = value(h, q, k);
			if (!(abs(x) <= abs(best[j]))) best[j] = x;
		}
		const c = el("canvas", { width: w, height: t }), g = c.getContext("2d"), d = g.createImageData(w, t);
		best.forEach((x, j) => x === x && d.data.set([...v.color(x), 255], 4 * j));
		g.putImageData(d, 0, 0);
		return c;
	})();
	const thumbs = p.heads.map((name, h) => {
		const canvas = el("canvas"), note = el("small"), b = el("button", {}, canvas, name, note);
		b.onpointerenter = b.onfocus = () => update(head = h);
		b.onclick = () => update(locked = locked.includes(h) ? locked.filter((x) => x !== h) : [...locked.slice(0, 1), h]);
		return { b, canvas, note };
	});
	const big = MARKS.map(() => {
		const canvas = el("canvas", { tabIndex: 0 }), name = el("small");
		canvas.onpointermove = (e) => move(floor((e.offsetY - 5) / ch), max(0, floor((e.offsetX - p.left) / cw)));
		return { canvas, name, box: el("div", {}, name, canvas) };
	});
	const strips = p.strips.map((s) => strip(v, s.keys ? cols : rows, s, (i) => s.queries ? move(i, -1) : move(q, i),
		(i) => value(shown[0], q, s.keys && i), (i) => s.queries && i === q || s.keys && i === k));
	body.append(H > 1 ? el("sl-grid", {}, ...thumbs.map((t) => t.b)) : "", v.say, el("sl-row", {}, ...p.cell ? big.map((f) => f.box) : [], ...strips));

	const paint = (f, h, room) => {
		const { left, foot } = p, x = (i) => left + (i + .5) * cw, y = (i) => (i + .5) * ch;
		cw = min((room - left - 4) / K, p.cell);
		ch = p.tall || cw;
		const width = cw * K, height = ch * Q, g = sized(f.canvas, left + width + 4, height + foot + 5, v.ink);
		g.translate(0, 5);
		g.drawImage(image(h, round(max(width, height) * devicePixelRatio)), left, 0, width, height);
		const label = (t, turn, ...place) => {
			g.save();
			g.translate(...place);
			g.rotate(turn);
			g.clearRect(-80, -6, 79, 12);
			g.fillText(t, -5, 0, 66);
			g.restore();
		};
		const row = (i) => label(rows[i], 0, left, y(i)), col = (i) => label(cols[i], -Math.PI / 2, x(i), height);
		g.font = "10px system-ui";
		for (let i = 0; i < Q; i += ceil(11 / ch)) row(i);
		for (let i = 0; i < K; i += ceil(11 / cw)) col(i);
		g.font = "bold 10px system-ui";
		row(q);
		g.strokeRect(left, q * ch, width, ch);
		if (k < 0) return;
		col(k);
		g.strokeRect(left + k * cw, 0, cw, height);
		if (!p.lags) return;
		const back = min(q, k), on = min(Q - q, K - k) - 1;
		g.setLineDash([3, 3]);
		g.stroke(new Path2D(`M${x(k - back)} ${y(q - back)}L${x(k + on)} ${y(q + on)}`));
	};
	const update = () => {
		shown = locked.length ? locked : [head];
		const room = v.div.clientWidth, share = room < 520 ? 1 : shown.length > 1 ? .48 : p.lags ? .6 : 1;
		thumbs.forEach(({ b }, h) => {
			const i = locked.indexOf(h);
			b.style.boxShadow = i >= 0 ? "0 0 0 2px " + MARKS[i] : h === shown[0] ? "0 0 0 1px" : "";
			b.ariaPressed = i >= 0;
		});
		big.forEach((f, n) => {
			f.box.hidden = !(n in shown);
			f.name.textContent = p.heads[shown[n]];
			f.name.style.color = locked.length ? MARKS[n] : "";
			if (p.cell && n in shown) paint(f, shown[n], room * share);
		});
		for (const s of strips) s.fill();
		const name = (n, t, i) => p.words[n] ? `${p.words[n]} '${t}' (${i})` : t;
		v.say.textContent = p.says ? p.says[v.frame][k] : [name(0, rows[q], q), k < 0 ? "" : name(1, cols[k], k) + (p.lags ? `, lag ${q - k}, ` : ", ")
			+ (p.causal && k > q ? "masked" : shown.map((h) => value(h, q, k).toFixed(p.digits)).join(" | "))
		].filter(String).join(" → ").replaceAll(" -", " −");
	};
	return () => {
		images = {};
		let n = p.columns, room = v.div.clientWidth + 6;
		while (n > 1 && room / n < 72) n = ceil(n / 2);
		const side = min(130, floor(room / n) - 10);
		thumbs.forEach(({ b, canvas, note }, h) => {
			b.style.width = side + 4 + "px";
			sized(canvas, side, side * p.ratio).drawImage(image(h, canvas.width), 0, 0, side, side * p.ratio);
			note.textContent = p.notes[v.frame][h];
		});
		update();
	};
}

const live = new Set(), again = () => live.forEach((v) => v.div.isConnected ? v.draw() : live.delete(v));
async function start(div) {
	div.dataset.live = 1;
	const p = JSON.parse(div.dataset.view), { frames } = p, at = await decode(p), body = el("div");
	const v = { div, p, at, body, frame: p.start, say: el("sl-say", { ariaLive: "polite" }), bar: el("i") };
	const show = view(v), out = el("output", {}, frames[p.start]), slider = el("input", { type: "range", max: frames.length - 1, value: p.start });
	v.draw = () => div.clientWidth && (colours(v), show());
	slider.oninput = () => v.draw(out.textContent = frames[v.frame = +slider.value]);
	div.replaceChildren(el("style", {}, CSS), el("sl-row", {}, el("b", {}, p.title),
		frames[1] ? el("label", {}, slider, " ", out) : "", p.ends ? el("span", {}, p.ends[0], v.bar, p.ends[1]) : ""), body);
	let width = div.clientWidth;
	v.draw();
	new ResizeObserver(() => width !== (width = div.clientWidth) && requestAnimationFrame(v.draw)).observe(div);
	live.add(v);
}
const all = () => document.querySelectorAll(".smearlens:not([data-live])").forEach(start);
const ready = () => {
	all();
	for (const node of document.querySelectorAll("html,body")) new MutationObserver(again).observe(node, { attributes: true });
};
matchMedia("(prefers-color-scheme:dark)").onchange = again;
document.readyState === "loading" ? addEventListener("DOMContentLoaded", ready) : ready();
if (window.document$) document$.subscribe(all);
})();
