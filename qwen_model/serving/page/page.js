// The chat page. Text of the model becomes nodes by textContent alone, never HTML.

const $ = (id) => document.getElementById(id);
const messages = [];
let model = "";
let request = null; // the AbortController of the answer that is coming

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// Markdown: what models write. Inline: code, bold, italics, links; blocks: fences, headings, lists, quotes, tables.
const INLINE = /(`+)(.+?)\1|\*\*(.+?)\*\*|__(.+?)__|\*([^\s*](?:.*?[^\s*])?)\*|\[([^\]]+)\]\((https?:\/\/[^\s)]+)\)/s;

function inline(parent, text) {
  for (let found; (found = INLINE.exec(text)); text = text.slice(found.index + found[0].length)) {
    parent.append(text.slice(0, found.index));
    const [, , code, bold, strong, italic, label, url] = found;
    if (code !== undefined) parent.append(element("code", code));
    else if (url !== undefined) {
      const link = parent.appendChild(element("a", label));
      link.href = url;
      link.rel = "noreferrer noopener";
      link.target = "_blank";
    } else if (italic !== undefined) inline(parent.appendChild(element("em")), italic);
    else inline(parent.appendChild(element("strong")), bold ?? strong);
  }
  parent.append(text);
}

function codeBlock(lines) {
  const block = element("pre");
  const code = block.appendChild(element("code", lines.join("\n")));
  const copy = block.appendChild(element("button", "Copy"));
  copy.type = "button";
  copy.addEventListener("click", () => navigator.clipboard?.writeText(code.textContent));
  return block;
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function table(lines) {
  const made = element("table");
  lines.filter((_, index) => index !== 1).forEach((line, index) => {
    const row = made.appendChild(element("tr"));
    for (const cell of cells(line)) inline(row.appendChild(element(index ? "td" : "th")), cell);
  });
  return made;
}

const STARTS = [/^\s*(`{3,}|~{3,})/, /^#{1,6}\s/, /^\s*([-*+]|\d+[.)])\s/, /^>\s?/, /^\s*\|.*\|\s*$/, /^\s*([-*_])(\s*\1){2,}\s*$/];

function list(lines) {
  const made = element(/^\s*\d/.test(lines[0]) ? "ol" : "ul");
  if (made.tagName === "OL") made.start = parseInt(lines[0], 10);
  const indent = lines[0].search(/\S/);
  let item = null;
  let inner = [];
  const close = () => item && inner.length && item.append(markdown(inner.join("\n")));
  for (const line of lines) {
    const mark = /^(\s*)([-*+]|\d+[.)])\s+(.*)$/.exec(line);
    if (mark && mark[1].length <= indent + 1) {
      close();
      item = made.appendChild(element("li"));
      inner = [];
      inline(item, mark[3]);
    } else inner.push(line.replace(/^\s{1,4}/, ""));
  }
  close();
  return made;
}

function markdown(text) {
  const made = document.createDocumentFragment();
  const lines = text.split("\n");
  const take = (more) => {
    const taken = [lines.shift()];
    while (lines.length && more(lines[0])) taken.push(lines.shift());
    return taken;
  };
  while (lines.length) {
    const line = lines[0];
    const fence = STARTS[0].exec(line);
    if (!line.trim()) lines.shift();
    else if (fence) {
      lines.shift();
      const code = [];
      while (lines.length && !lines[0].trim().startsWith(fence[1])) code.push(lines.shift());
      lines.shift();
      made.append(codeBlock(code));
    } else if (STARTS[1].test(line)) {
      const level = /^#+/.exec(line)[0].length;
      inline(made.appendChild(element(`h${Math.min(level + 1, 6)}`)), lines.shift().replace(/^#+\s+/, ""));
    } else if (STARTS[5].test(line)) {
      lines.shift();
      made.append(element("hr"));
    } else if (STARTS[2].test(line)) made.append(list(take((next) => /^\s+\S/.test(next) || STARTS[2].test(next))));
    else if (STARTS[3].test(line)) {
      const quoted = take((next) => STARTS[3].test(next)).map((each) => each.replace(STARTS[3], ""));
      made.appendChild(element("blockquote")).append(markdown(quoted.join("\n")));
    } else if (STARTS[4].test(line) && /^[\s|:-]+$/.test(lines[1] ?? "x")) made.append(table(take((next) => STARTS[4].test(next))));
    else inline(made.appendChild(element("p")), take((next) => next.trim() && !STARTS.some((start) => start.test(next))).join("\n"));
  }
  return made;
}

function article(role) {
  const made = element("article", undefined, role);
  made.append(element("div", undefined, "text"));
  return $("messages").appendChild(made);
}

function showUser(text) {
  article("user").querySelector(".text").textContent = text;
}

function addTools(node) {
  document.querySelectorAll(".regenerate").forEach((button) => button.remove());
  const tools = node.appendChild(element("div", undefined, "tools"));
  const again = tools.appendChild(element("button", "Regenerate", "regenerate"));
  again.addEventListener("click", () => {
    if (request) return;
    messages.pop();
    node.remove();
    answer();
  });
}

function settings() {
  const chosen = {};
  for (const name of ["temperature", "top_p", "max_tokens"]) {
    if ($(name).value !== "") chosen[name] = Number($(name).value);
  }
  if (!$("thinking").checked) chosen.chat_template_kwargs = { enable_thinking: false };
  return chosen;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function setBusy(busy) {
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("messages").setAttribute("aria-busy", busy);
}

async function answer() {
  const node = article("assistant");
  const text = node.querySelector(".text");
  const found = { content: "", reasoning: "" };
  let details = null;
  let drawn = 0;
  const draw = () => {
    drawn = 0;
    const nearEnd = $("messages").scrollHeight - $("messages").scrollTop - $("messages").clientHeight < 120;
    if (found.reasoning && !details) {
      details = element("details");
      details.append(element("summary", "Reasoning"), element("div"));
      text.before(details);
    }
    if (details) details.lastChild.textContent = found.reasoning;
    text.replaceChildren(markdown(found.content));
    if (nearEnd) node.scrollIntoView({ block: "end" });
  };
  document.querySelectorAll("article.error").forEach((each) => each.remove());
  request = new AbortController();
  setBusy(true);
  try {
    const system = $("system").value.trim();
    const body = {
      model,
      stream: true,
      messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
      ...settings(),
    };
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: request.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const delta = event.choices[0]?.delta ?? {};
      found.content += delta.content ?? "";
      found.reasoning += delta.reasoning_content ?? "";
      drawn ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      const failed = article("error");
      failed.setAttribute("role", "alert");
      failed.querySelector(".text").textContent = error.message;
    }
  } finally {
    cancelAnimationFrame(drawn);
    draw();
    request = null;
    setBusy(false);
    messages.push({ role: "assistant", content: found.content });
    addTools(node);
    $("input").focus();
  }
}

function send() {
  const text = $("input").value.trim();
  if (!text || request) return;
  $("input").value = "";
  grow();
  messages.push({ role: "user", content: text });
  showUser(text);
  answer();
}

function grow() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight}px`;
}

function theme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && request?.abort());
$("stop").addEventListener("click", () => request?.abort());
$("theme").addEventListener("click", theme);
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("open-settings").addEventListener("click", () => {
  $("settings").hidden = !$("settings").hidden;
  $("open-settings").setAttribute("aria-expanded", String(!$("settings").hidden));
});
$("new").addEventListener("click", () => {
  request?.abort();
  messages.length = 0;
  $("messages").replaceChildren();
  $("input").focus();
});

const models = await (await fetch("v1/models")).json();
model = models.data[0].id;
$("model").textContent = document.title = model;
