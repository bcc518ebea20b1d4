// Progress as it goes on: an element with data-events listens to the events of an analysis, one with data-poll asks
// for the state of a fetch now and then.
const FINAL = "final";
const POLL_MS = 1000;
const UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB"];

function show(card, run, count) {
  const { done, total, phase } = run.progress;
  const bar = card.querySelector("progress");
  if (bar) {
    bar.max = total || 1;
    bar.value = done;
  }
  const texts = { status: run.status, phase, count: total ? count(done, total) : "" };
  for (const [name, text] of Object.entries(texts)) {
    const place = card.querySelector(`[data-live="${name}"]`);
    if (place && place.textContent !== text) place.textContent = text;
  }
}

function size(bytes) {
  let unit = 0;
  while (bytes >= 1024 && unit < UNITS.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  const digits = unit ? 1 : 0;
  return `${bytes.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits })} ${UNITS[unit]}`;
}

async function ask(card) {
  const answer = await fetch(card.dataset.poll).catch(() => null);
  if (answer?.ok) {
    const run = await answer.json();
    show(card, run, (done, total) => `${size(done)} of ${size(total)}`);
    if (run.status !== "queued" && run.status !== "running") {
      // What else the page says of it has changed too.
      location.reload();
      return;
    }
  }
  setTimeout(ask, POLL_MS, card);
}

for (const card of document.querySelectorAll("[data-events]")) {
  const events = new EventSource(card.dataset.events);
  const take = (event) => {
    show(card, JSON.parse(event.data), (done, total) => `${done}/${total}`);
    if (event.type === FINAL) {
      events.close();
      location.reload();
    }
  };
  for (const type of ["status", "progress", FINAL]) events.addEventListener(type, take);
}

for (const card of document.querySelectorAll("[data-poll]")) ask(card);
