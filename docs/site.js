// The page's own entry in the list at the left, and what a search has marked on the page
// that it led to, are brought to where one sees them. (The list is hidden on a phone; a
// page opened from a file does not know where one comes from.)
addEventListener("load", () => {
  const entry = document.querySelector(".sidebar-tree .current-page");
  const list = document.querySelector(".sidebar-scroll");
  if (entry && list && matchMedia("(min-width: 64em)").matches)
    list.scrollTop += entry.getBoundingClientRect().top - innerHeight / 2;
  const from = document.referrer;
  if (location.hash || (from && !from.includes("/search.html"))) return;
  const shown = () => {
    const marked = document.querySelector("article .highlighted");
    marked?.scrollIntoView({ block: "center" });
    return marked;
  };
  if (!shown()) // Sphinx marks when the page is there, or a moment later
    new MutationObserver((_, observer) => shown() && observer.disconnect()).observe(
      document.querySelector("article"), { childList: true, subtree: true });
});

// A click in the contents that lie over a narrow page leads to the page.
addEventListener("click", ({ target }) => {
  if (target.closest(".toc-drawer a")) document.getElementById("__toc").checked = false;
});
