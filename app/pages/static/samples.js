// A probe's samples within its page, once they are looked at. Without this file they are a link.
async function show(place) {
  const answer = await fetch(place.dataset.samples);
  if (!answer.ok) return;
  const there = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("samples");
  if (there) place.replaceChildren(...there.children);
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    seen.unobserve(entry.target);
    show(entry.target);
  }
});

for (const place of document.querySelectorAll("[data-samples]")) seen.observe(place);
