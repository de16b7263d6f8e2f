/** Figures as files: PNG, SVG and PDF. */

import { pixelCanvas } from "./dom";
import type { Figure, Item } from "./figure";
import { writePdf } from "./pdf";

export type FileKind = "png" | "svg" | "pdf";

const FONT = "Helvetica, Arial, sans-serif";

export async function writeFigure(figure: Figure, kind: FileKind): Promise<Blob> {
  if (kind === "svg") return new Blob([writeSvg(figure)], { type: "image/svg+xml" });
  if (kind === "pdf") return writePdf(figure);
  return writePng(figure);
}

function writePng(figure: Figure): Promise<Blob> {
  const zoom = 3;
  const [canvas, context] = pixelCanvas(Math.round(figure.width * zoom), Math.round(figure.height * zoom));
  context.scale(zoom, zoom);
  context.fillStyle = "#fff";
  context.fillRect(0, 0, figure.width, figure.height);
  context.imageSmoothingQuality = "high";
  for (const item of figure.items) {
    if (item.kind === "image") context.drawImage(item.canvas, item.x, item.y, item.width, item.height);
    else if (item.kind === "rect") {
      context.fillStyle = item.colour;
      context.fillRect(item.x, item.y, item.width, item.height);
    } else {
      context.fillStyle = "#000";
      context.font = `${item.isBold ? "bold " : ""}${item.size}px ${FONT}`;
      context.textAlign = ({ start: "left", middle: "center", end: "right" } as const)[item.anchor];
      context.fillText(item.text, item.x, item.y);
    }
  }
  return new Promise((resolve, reject) => {
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("This browser cannot write a PNG of this size."))));
  });
}

function writeSvg({ width, height, items }: Figure): string {
  const size = `width="${width}pt" height="${height}pt" viewBox="0 0 ${width} ${height}"`;
  const lines = [`<svg xmlns="http://www.w3.org/2000/svg" ${size}>`, `<rect width="100%" height="100%" fill="#fff"/>`];
  return [...lines, ...items.map(svgItem), "</svg>", ""].join("\n");
}

function svgItem(item: Item): string {
  if (item.kind === "text") {
    const weight = item.isBold ? ' font-weight="bold"' : "";
    const style = `font-family="${FONT}" font-size="${item.size}" text-anchor="${item.anchor}"${weight}`;
    return `<text x="${item.x}" y="${item.y}" ${style}>${escapeText(item.text)}</text>`;
  }
  const box = `x="${item.x}" y="${item.y}" width="${item.width}" height="${item.height}"`;
  if (item.kind === "rect") return `<rect ${box} fill="${item.colour}"/>`;
  return `<image ${box} preserveAspectRatio="none" href="${item.canvas.toDataURL("image/png")}"/>`;
}

function escapeText(text: string): string {
  return text.replace(/[&<>]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[sign]!);
}

/** Hand a file to the user. */
export function download(blob: Blob, name: string): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
