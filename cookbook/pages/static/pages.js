// What is nicer with a script; without it, the forms do the work.
"use strict";

const POLL = 500; // milliseconds

// Forms: say that something goes on, and that a file is too large before it is sent.

function sizeOf(form) {
  const inputs = [...form.querySelectorAll("input[type=file]")];
  return inputs.flatMap((input) => [...input.files]).reduce((sum, file) => sum + file.size, 0);
}

function checkSize(form) {
  const input = form.querySelector("input[type=file]");
  const megabytes = Math.floor(form.dataset.max / 2 ** 20);
  const isTooLarge = sizeOf(form) > form.dataset.max;
  input.setCustomValidity(isTooLarge ? `At most ${megabytes} MB at once. Send fewer, or split it.` : "");
}

for (const form of document.querySelectorAll("form[data-drop]")) {
  const input = form.querySelector("input[type=file]");
  input.addEventListener("change", () => checkSize(form));
  for (const kind of ["dragenter", "dragover"]) {
    form.addEventListener(kind, (event) => {
      event.preventDefault();
      form.classList.add("over");
    });
  }
  form.addEventListener("dragleave", () => form.classList.remove("over"));
  form.addEventListener("drop", (event) => {
    event.preventDefault();
    form.classList.remove("over");
    const transfer = new DataTransfer();
    const files = [...event.dataTransfer.files];
    for (const file of input.multiple ? files : files.slice(0, 1)) transfer.items.add(file);
    input.files = transfer.files;
    checkSize(form);
    form.requestSubmit();
  });
  for (const hint of form.querySelectorAll(".hint")) hint.hidden = false;
}

// A file that is dropped beside a form must not replace the page.
for (const kind of ["dragover", "drop"]) {
  document.addEventListener(kind, (event) => event.preventDefault());
}

document.addEventListener("submit", (event) => {
  const button = event.target.querySelector("button");
  setTimeout(() => (button.disabled = true)); // after its form has been read
});
window.addEventListener("pageshow", () => {
  for (const button of document.querySelectorAll("button")) button.disabled = false;
});

// Progress: look again while something goes on, and show the files that are done.

function parse(html) {
  return new DOMParser().parseFromString(html, "text/html");
}

async function get(address) {
  const reply = await fetch(address);
  if (!reply.ok) throw new Error(`${address}: ${reply.status}`);
  return parse(await reply.text());
}

function count(progress) {
  return Number(progress.dataset.active);
}

// A row stays in place while its job goes on, so that its button keeps the focus and a press.
function updateRow(shown, fresh) {
  const texts = fresh.querySelectorAll("[data-text]");
  for (const [number, old] of shown.querySelectorAll("[data-text]").entries()) {
    const { textContent } = texts[number];
    if (old.textContent !== textContent) old.textContent = textContent;
  }
  const bar = shown.querySelector("progress");
  for (const { name, value } of fresh.querySelector("progress")?.attributes ?? []) bar.setAttribute(name, value);
}

function update(shown, fresh) {
  const ids = new Set([...fresh.children].map((row) => row.id));
  for (const row of [...shown.children]) if (!ids.has(row.id)) row.remove();
  for (const [number, row] of [...fresh.children].entries()) {
    const old = shown.children[number];
    if (old?.id === row.id) updateRow(old, row);
    else shown.insertBefore(row, old ?? null);
  }
}

async function follow() {
  const shown = document.getElementById("progress");
  if (!shown || !count(shown)) return;
  try {
    const fresh = (await get("/progress")).getElementById("progress");
    const hasFinished = count(fresh) < count(shown);
    shown.dataset.active = count(fresh);
    update(shown, fresh);
    if (hasFinished) {
      const files = (await get("/")).getElementById("files-here");
      document.getElementById("files-here").replaceChildren(...files.childNodes);
    }
  } catch {
    // The app was stopped, or is being started again.
  }
  setTimeout(follow, POLL);
}
follow();

// Arrow keys: from card to card, and on a page to the next one.

function columnsOf(cards) {
  const top = cards[0].offsetTop;
  const next = cards.findIndex((card) => card.offsetTop > top);
  return next < 0 ? cards.length : next;
}

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const active = document.activeElement;
  if (active.matches("input, pre, summary, button")) return;
  const card = active.closest(".card");
  if (card) {
    const cards = [...card.parentElement.children];
    const columns = columnsOf(cards);
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
    const next = cards[cards.indexOf(card) + steps[event.key]];
    if (next) {
      event.preventDefault();
      next.querySelector("a").focus();
    }
    return;
  }
  const rel = { ArrowRight: "next", ArrowLeft: "prev" }[event.key];
  const link = rel && document.querySelector(`a[rel=${rel}]`);
  if (link) link.click();
});
