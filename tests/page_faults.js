// What a reader of this page cannot see or read, as lines of text; none for a good page. Run inside the page.
(() => {
  const found = [];
  const root = document.documentElement;
  const name = (e) => {
    const id = e.id || e.getAttribute("class") || (e.closest("[id]") || {}).id || "";
    return `<${e.tagName.toLowerCase()}${id ? " " + id : ""}> ${(e.textContent || "").trim().slice(0, 40)}`;
  };
  const shown = (e) => e.checkVisibility({ opacityProperty: true, visibilityProperty: true });
  const style = (e) => getComputedStyle(e);

  // The page itself never scrolls sideways.
  if (root.scrollWidth > root.clientWidth)
    found.push(`the page is ${root.scrollWidth} wide in ${root.clientWidth}`);

  // What is cut off: texts outside of their drawing, boxes that spill or hide what they hold.
  const drawings = [...document.querySelectorAll("svg")].filter(shown);
  for (const svg of drawings) {
    const frame = svg.getBoundingClientRect();
    if (frame.width < 100 || frame.height < 50) found.push(`a drawing of ${frame.width} by ${frame.height}`);
    const holder = svg.parentElement.getBoundingClientRect();
    const scrolls = /auto|scroll/.test(style(svg.parentElement).overflowX);
    if (frame.right > holder.right + 1 && !scrolls) found.push(`a drawing beyond ${name(svg.parentElement)}`);
    const texts = [...svg.querySelectorAll("text")].map((e) => [e, e.getBoundingClientRect()]);
    for (const [e, box] of texts)
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1)
        found.push(`cut off at the edge of its drawing: ${name(e)}`);
    texts.forEach(([e, a], i) =>
      texts.slice(i + 1).forEach(([f, b]) => {
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > 2 && high > 0.35 * Math.min(a.height, b.height)) found.push(`text on text: ${name(e)} / ${name(f)}`);
      }));
  }
  for (const e of document.querySelectorAll("body *")) {
    if (e.closest("svg") || !shown(e) || e.clientWidth === 0 || e.scrollWidth <= e.clientWidth + 1) continue;
    const overflow = style(e).overflowX;
    if (overflow === "hidden" || overflow === "clip") found.push(`cut off: ${name(e)}`);
    if (overflow === "visible" && style(e).display !== "inline") found.push(`spills ${e.scrollWidth - e.clientWidth}: ${name(e)}`);
  }

  // Contrast of every text with what lies under it: WCAG 2.2, 1.4.3.
  const parse = (text) => {
    const parts = (text.match(/[\d.]+(e-?\d+)?/g) || []).map(Number);
    const scale = text.startsWith("color(") ? 255 : 1;
    return text.startsWith("url") || parts.length < 3 ? null : [...parts.slice(0, 3).map((x) => x * scale), parts.length > 3 ? parts[3] : 1];
  };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const luminance = (colour) => {
    const [r, g, b] = colour.slice(0, 3).map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const opacity = (e) => (e && e !== document ? Number(style(e).opacity) * opacity(e.parentElement) : 1);
  const canvas = style(root).colorScheme.includes("dark") && matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18, 1] : [255, 255, 255, 1];
  const paint = (e) => {
    const inside = e instanceof SVGElement && e.tagName !== "svg";
    const colour = parse(inside ? style(e).fill : style(e).backgroundColor);
    return colour && [...colour.slice(0, 3), colour[3] * opacity(e) * (inside ? Number(style(e).fillOpacity) : 1)];
  };
  const beneath = (e, x, y) => {
    const stack = document.elementsFromPoint(x, y);
    const at = stack.findIndex((one) => one === e);
    const seen = at < 0 ? [e.closest("svg") || e] : stack.slice(at + 1);
    let chain = at < 0 ? [] : seen;
    if (!(e instanceof SVGElement) || at < 0) { // boxes: every ancestor, hit or not
      chain = [];
      for (let one = e.closest("svg") || e; one; one = one.parentElement) chain.push(one);
    }
    return chain.filter((one) => one.tagName !== "text" && one.tagName !== "tspan").map(paint).filter(Boolean)
      .reduceRight((under, top) => over(top, under), canvas);
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const e = node.parentElement;
    if (!node.textContent.trim() || ["STYLE", "SCRIPT", "title", "desc"].includes(e.tagName) || !shown(e)) continue;
    const inside = e instanceof SVGElement;
    const range = document.createRange();
    range.selectNodeContents(node);
    const place = () => (inside ? e : range).getBoundingClientRect();
    let box = place();
    if (inside && (box.left < 0 || box.right > innerWidth)) { // what lies under it is only known in view
      e.scrollIntoView({ inline: "center", block: "nearest" });
      box = place();
    }
    if (!box.width || box.right < 0) continue; // for screen readers only, until it has the focus
    const colour = parse(inside ? style(e).fill : style(e).color);
    if (!colour) { found.push(`no colour: ${name(e)}`); continue; }
    const under = beneath(e, (box.left + box.right) / 2, (box.top + box.bottom) / 2);
    const above = over([...colour.slice(0, 3), colour[3] * opacity(e) * (inside ? Number(style(e).fillOpacity) : 1)], under);
    const [dark, light] = [luminance(above), luminance(under)].sort((a, b) => a - b);
    const ratio = (light + 0.05) / (dark + 0.05);
    const scale = inside ? Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b) : 1; // turned or not
    const size = parseFloat(style(e).fontSize) * scale;
    const large = size >= 24 || (size >= 18.66 && Number(style(e).fontWeight) >= 700);
    if (ratio < (large ? 3 : 4.5)) found.push(`contrast ${ratio.toFixed(2)}: ${name(e)}`);
    if (size < 9) found.push(`letters of ${size.toFixed(1)} px: ${name(e)}`);
  }
  return [...new Set(found)];
})()
