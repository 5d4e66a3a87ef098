// The page's own entry in the list at the left, and what a search has marked on the page,
// are brought to where one sees them. (The list is hidden on a phone.)
addEventListener("load", () => {
  const entry = document.querySelector(".sidebar-tree .current-page");
  const list = document.querySelector(".sidebar-scroll");
  if (entry && list && matchMedia("(min-width: 64em)").matches)
    list.scrollTop += entry.getBoundingClientRect().top - innerHeight / 2;
  if (location.hash) return;
  const shown = () => {
    const marked = document.querySelector("article .highlighted");
    marked?.scrollIntoView({ block: "center" });
    return marked;
  };
  if (!shown()) // Sphinx marks when the page is there, or a moment later
    new MutationObserver((_, observer) => shown() && observer.disconnect()).observe(
      document.querySelector("article"), { childList: true, subtree: true });
});
